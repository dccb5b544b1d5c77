"""Rows that are asked for in steps, of a server that would take them in one call."""

import asyncio

import torch

from petals_eval.swarm.activations import Activations
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.client import HopClient
from petals_eval.swarm.wire.server_info import ServerInfo
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import FakeTransport, server, settings


def test_each_row_has_a_session_of_its_own_one_after_the_other():
    """As where they were first computed: an audit may take no more of a cache at once."""
    transport, chosen = FakeTransport(), settings()
    transport.info = ServerInfo("2.2.0", torch.float32, torch.float32, None, session_tensors=3)
    client = HopClient(transport, PeerBook(chosen))
    hop, entering = Hop(server("a", 0, 2), Span(0, 2)), Activations(torch.zeros(3, 600, 4))
    asyncio.run(client.run(hop, entering, positions_per_step=256))
    assert [(session.rows, session.max_length) for session in transport.sessions] == [(1, 600)] * 3
    assert [session.steps for session in transport.sessions] == [[(1, 256, 4), (1, 256, 4), (1, 88, 4)]] * 3
    assert transport.max_sessions == 1

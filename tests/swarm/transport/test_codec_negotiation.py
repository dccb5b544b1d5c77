"""Which servers take a lossy code: asked once each, told apart from servers that fail, and never a silent change."""

import asyncio

import pytest
import torch

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerAnswerError, PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm.directory.routing import Hop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.codec_negotiation import WireBook
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.trust.determinism_guard import CheckedCalls
from petals_eval.swarm.wire.messages import LOSSY, ServerInfo
from tests.swarm.fakes import FakeCalls, server, settings

FLOAT32 = ServerInfo("2.2.0", torch.float32, torch.float32, 10)
BFLOAT16 = ServerInfo("2.2.0", torch.bfloat16, torch.bfloat16, 10)
BLOCKWISE = LOSSY["blockwise8"]
DONE = Answer(torch.zeros(1, 1, 2), 0.0, 8, 8)


class Peer:
    """Answers in these codes; raises what is set for the others. None: lossless."""

    def __init__(self, **errors):
        self.errors = errors
        self.asked = []

    async def __call__(self, code):
        self.asked.append(None if code is None else code.name)
        await asyncio.sleep(0)
        error = self.errors.get("lossless" if code is None else code.name)
        if error is not None:
            raise error
        return DONE


def test_a_server_that_takes_the_code_is_asked_once():
    async def run():
        book, peer = WireBook("blockwise8"), Peer()
        found = await asyncio.gather(*(book.code_for("a", FLOAT32, peer) for _ in range(5)))
        assert found == [BLOCKWISE] * 5
        assert await book.code_for("a", BFLOAT16, peer) is BLOCKWISE
        assert peer.asked == ["blockwise8"]
        assert (book.taken_by, book.lossless) == ({"a"}, {})

    asyncio.run(run())


@pytest.mark.parametrize("error", [PeerRefusedError("ImportError('bitsandbytes')"), PeerAnswerError("found 3 bytes")])
def test_a_server_that_does_not_is_spoken_to_lossless_for_a_reason(error):
    async def run():
        book, peer = WireBook("blockwise8"), Peer(blockwise8=error)
        assert await book.code_for("a", FLOAT32, peer) is None
        assert await book.code_for("a", FLOAT32, peer) is None
        assert peer.asked == ["blockwise8", None]
        assert (book.taken_by, book.lossless) == (set(), {"a": str(error)})
        book.forget("a")  # it comes back with the library installed
        assert await book.code_for("a", FLOAT32, Peer()) is BLOCKWISE
        assert (book.taken_by, book.lossless) == ({"a"}, {})

    asyncio.run(run())


def test_a_server_that_fails_whatever_is_sent_is_not_the_codes_fault():
    async def run():
        book, broken = WireBook("float16"), PeerRefusedError("out of memory")
        with pytest.raises(PeerRefusedError, match="out of memory"):
            await book.code_for("a", FLOAT32, Peer(float16=broken, lossless=broken))
        gone = Peer(float16=PeerUnreachableError("gone"))
        with pytest.raises(PeerUnreachableError):
            await book.code_for("a", FLOAT32, gone)
        assert gone.asked == ["float16"]
        assert (book.taken_by, book.lossless) == (set(), {})
        assert await book.code_for("a", FLOAT32, Peer()) is LOSSY["float16"]

    asyncio.run(run())


def test_float16_is_not_used_where_it_saves_nothing():
    async def run():
        book, peer = WireBook("float16"), Peer()
        assert await book.code_for("a", BFLOAT16, peer) is None
        assert peer.asked == []
        assert book.lossless == {"a": "it computes in bfloat16: float16 saves nothing"}
        assert await WireBook(None).code_for("a", FLOAT32, peer) is None

    asyncio.run(run())


def test_questions_of_the_check_for_training_mode_go_lossless():
    class Noting(FakeCalls):
        lossless: list[bool] = []  # noqa: RUF012

        async def forward(self, hop, hidden, prompts, *, lossless=False):
            self.lossless.append(lossless)
            return await super().forward(hop, hidden, prompts)

    async def run():
        chosen = settings(wire="blockwise8")
        calls = Noting()
        checked = CheckedCalls(calls, PeerBook(chosen), chosen)
        await checked.forward(Hop(server("a", 0, 4), 0, 4), torch.randn(2, 3, 8), None)
        assert calls.lossless == [True, True, False]

    asyncio.run(run())


# -- over libp2p


HIDDEN = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def swarm(realdata):
    """The first two blocks on a server that has no bitsandbytes."""
    options = {"mode": "thread", "max_batch_size": 50_000}
    with LocalSwarm(realdata / "stories260K-hf", spans=[(2, 5)], **options) as running:
        running.add_server((0, 2), has_bitsandbytes=False)
        yield running


def blocks_over(swarm, wire, hidden=HIDDEN, prompts=None):
    peers = tuple(swarm.initial_peers)
    chosen = SwarmSettings(initial_peers=peers, deadline=10.0, wire=wire, max_tokens_per_call=50_000)
    with SwarmConnection.connect(chosen) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, 5)
        answer = blocks(hidden, prompts)
        return answer, blocks.wires, dict(blocks.histories)


@pytest.mark.parametrize(("wire", "most"), [("float16", 5e-3), ("blockwise8", 0.1), ("uniform8", 0.2)])
@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "deep prompts"])
def test_each_code_through_servers(swarm, wire, most, prompted):
    prompts = 0.5 * torch.randn(5, 1, 4, 64, generator=torch.Generator().manual_seed(1)) if prompted else None
    exact, _, _ = blocks_over(swarm, None, prompts=prompts)
    answer, book, _ = blocks_over(swarm, wire, prompts=prompts)
    held, without = (each.peer_id for each in swarm.servers)
    if wire == "blockwise8":
        assert book.taken_by == {held}
        assert list(book.lossless) == [without]
        assert "bitsandbytes" in book.lossless[without]
    else:
        assert book.taken_by == {held, without}
        assert book.lossless == {}
    moved = (answer - exact).abs()
    assert answer.dtype is exact.dtype
    assert 0 < float(moved.mean()) < most * float(exact.std())


@pytest.mark.parametrize("wire", ["float16", "uniform8"])
def test_long_messages_stream_in_their_code(swarm, wire):
    hidden = torch.randn(200, 100, 64, generator=torch.Generator().manual_seed(0))  # 1.2 MiB in 8 bits
    answer, book, histories = blocks_over(swarm, wire, hidden)
    assert book.lossless == {}
    per_value = LOSSY[wire].bytes_per_value
    for history in histories.values():
        assert history.bytes_sent > 2**20
        assert history.bytes_sent == pytest.approx(per_value * hidden.numel(), rel=0.01)
        assert history.bytes_received == pytest.approx(per_value * hidden.numel(), rel=0.01)
    exact, _, _ = blocks_over(swarm, None, hidden)
    assert float((answer - exact).abs().mean()) < 0.2 * float(exact.std())

"""Which servers take a lossy code: asked once each, told apart from servers that fail, and never a silent change."""

import asyncio

import numpy as np
import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor
from hivemind.proto import runtime_pb2

from petals_eval.errors import PeerAnswerError, PeerRefusedError, PeerUnreachableError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import BrokenDecoder, FaultCount
from petals_eval.swarm import Work
from petals_eval.swarm.peers.peer import Peer, PeerBook
from petals_eval.swarm.transport.codec_negotiation import CAUSES, negotiate
from petals_eval.swarm.transport.rpc import Answer
from petals_eval.swarm.wire.codecs import LOSSY_CODES, encode
from petals_eval.swarm.wire.server_info import ServerInfo
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, run, server, settings
from tests.support.real_swarm import connect

FLOAT32 = ServerInfo("2.2.0", torch.float32, torch.float32, 10)
BFLOAT16 = ServerInfo("2.2.0", torch.bfloat16, torch.bfloat16, 10)
BLOCKWISE, FLOAT16 = LOSSY_CODES["blockwise8"], LOSSY_CODES["float16"]
DONE = Answer(torch.zeros(1, 1, 2), 0.0, 8, 8)


def some_peer() -> Peer:
    return PeerBook(settings()).of("a")


class Server:
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
    async def ask():
        peer, answering = some_peer(), Server()
        found = await asyncio.gather(*(negotiate(peer, BLOCKWISE, FLOAT32, answering) for _ in range(5)))
        assert found == [BLOCKWISE] * 5
        assert await negotiate(peer, BLOCKWISE, BFLOAT16, answering) is BLOCKWISE
        assert answering.asked == ["blockwise8"]
        assert (peer.has_taken_codec, peer.codec_refusal) == (True, None)

    asyncio.run(ask())


@pytest.mark.parametrize("error", [PeerRefusedError("ImportError('bitsandbytes')"), PeerAnswerError("found 3 bytes")])
def test_a_server_that_does_not_is_spoken_to_lossless_for_a_reason(error):
    async def ask():
        peer, answering = some_peer(), Server(blockwise8=error)
        assert await negotiate(peer, BLOCKWISE, FLOAT32, answering) is None
        assert await negotiate(peer, BLOCKWISE, FLOAT32, answering) is None
        assert answering.asked == ["blockwise8", None]
        assert (peer.has_taken_codec, peer.codec_refusal) == (False, str(error))
        peer.ask_anew()  # it comes back with the library installed
        assert await negotiate(peer, BLOCKWISE, FLOAT32, Server()) is BLOCKWISE
        assert (peer.has_taken_codec, peer.codec_refusal) == (True, None)

    asyncio.run(ask())


def test_a_server_that_fails_whatever_is_sent_is_not_the_codes_fault():
    async def ask():
        peer, broken = some_peer(), PeerRefusedError("out of memory")
        with pytest.raises(PeerRefusedError, match="out of memory"):
            await negotiate(peer, FLOAT16, FLOAT32, Server(float16=broken, lossless=broken))
        gone = Server(float16=PeerUnreachableError("gone"))
        with pytest.raises(PeerUnreachableError):
            await negotiate(peer, FLOAT16, FLOAT32, gone)
        assert gone.asked == ["float16"]
        assert (peer.has_taken_codec, peer.codec_refusal) == (False, None)
        assert await negotiate(peer, FLOAT16, FLOAT32, Server()) is FLOAT16

    asyncio.run(ask())


def test_float16_is_not_used_where_it_saves_nothing():
    async def ask():
        peer, answering = some_peer(), Server()
        assert await negotiate(peer, FLOAT16, BFLOAT16, answering) is None
        assert answering.asked == []
        assert peer.codec_refusal == "it computes in bfloat16: float16 saves nothing"

    asyncio.run(ask())


def test_questions_of_the_check_for_training_mode_go_lossless():
    class Noting(FakeTransport):
        lossless: list[bool] = []  # noqa: RUF012

        async def call(self, hop, activations, *, lossless=False):
            self.lossless.append(lossless)
            return await super().call(hop, activations, lossless=lossless)

    transport = Noting()
    run(pipeline(FakeDirectory(4, server("a", 0, 4)), transport, wire="blockwise8"), torch.randn(2, 3, 8))
    assert transport.lossless == [True, True, False]


# -- over libp2p


HIDDEN = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def swarm(realdata):
    """The first two blocks on a server that has no bitsandbytes."""
    options = {"mode": "thread", "max_batch_size": 50_000}
    with LocalSwarm(realdata / "stories260K-hf", spans=[(2, 5)], **options) as running:
        running.add_server((0, 2), has_bitsandbytes=False)
        yield running


def through(swarm, wire, hidden=HIDDEN, prompts=None):
    """The answer in this code, and what is known of each server then."""
    with connect(swarm, deadline=10.0, wire=wire, max_tokens_per_call=50_000) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, 5)
        return blocks(hidden, prompts), dict(blocks.peers)


def in_one_micro_batch(swarm, wire, hidden):
    """The same, in messages as long as there are."""
    with connect(swarm, deadline=10.0, wire=wire, max_tokens_per_call=50_000) as connection:
        blocks = connection.remote_sequential(swarm.dht_prefix, 5)
        [computed] = blocks.stream([Work(0, hidden, None)])
        return computed.hidden, dict(blocks.peers)


def takers(peers):
    return {peer.peer_id for peer in peers.values() if peer.has_taken_codec}


def refusals(peers):
    return {peer.peer_id: peer.codec_refusal for peer in peers.values() if peer.codec_refusal is not None}


@pytest.mark.parametrize(("wire", "most"), [("float16", 5e-3), ("blockwise8", 0.1), ("uniform8", 0.2)])
@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "deep prompts"])
def test_each_code_through_servers(swarm, wire, most, prompted):
    prompts = 0.5 * torch.randn(5, 1, 4, 64, generator=torch.Generator().manual_seed(1)) if prompted else None
    exact, peers = through(swarm, None, prompts=prompts)
    assert (takers(peers), refusals(peers)) == (set(), {}), "nobody is asked about a code that is not wanted"
    answer, peers = through(swarm, wire, prompts=prompts)
    held, without = (each.peer_id for each in swarm.servers)
    if wire == "blockwise8":
        assert takers(peers) == {held}
        assert list(refusals(peers)) == [without]
        assert "bitsandbytes" in refusals(peers)[without]
    else:
        assert takers(peers) == {held, without}
        assert refusals(peers) == {}
    moved = (answer - exact).abs()
    assert answer.dtype is exact.dtype
    assert 0 < float(moved.mean()) < most * float(exact.std())


@pytest.mark.parametrize(("wire", "fails"), [("float16", False), ("uniform8", True), ("blockwise8", True)])
def test_a_server_whose_numpy_is_too_new_for_its_hivemind_is_spoken_to_lossless_and_named(swarm, wire, fails):
    """Its answers are those of a lossless wire; whoever can read the code is sent it all the same."""
    old, new = swarm.servers
    before = new.fault_counts().get("broken_decoder", FaultCount()).times
    new.switch(BrokenDecoder())
    cause = "its hivemind (before 1.2) reads no 8-bit code under NumPy 2.4: "
    try:
        _, peers = through(swarm, wire)
        if not fails:
            assert takers(peers) == {old.peer_id, new.peer_id}
            return
        assert takers(peers) == {old.peer_id}
        [said] = refusals(peers).values()
        assert said.startswith(cause) and "only 0-dimensional arrays" in said
        assert peers[new.peer_id].failures == 0, "it is no failure of the server, which goes on"
        assert new.fault_counts()["broken_decoder"].times == before + 1, "it is asked once"
    finally:
        new.switch()


@pytest.mark.skipif(tuple(map(int, np.__version__.split(".")[:2])) < (2, 4), reason="hivemind reads its codes here")
def test_hiveminds_own_decoder_fails_in_the_words_that_are_known():
    message = encode(HIDDEN, runtime_pb2.CompressionType.UNIFORM_8BIT)
    with pytest.raises(TypeError) as caught:
        deserialize_torch_tensor(message)
    assert any(words in str(caught.value) for words in CAUSES)


@pytest.mark.parametrize("wire", ["float16", "uniform8"])
def test_long_messages_stream_in_their_code(swarm, wire):
    hidden = torch.randn(200, 100, 64, generator=torch.Generator().manual_seed(0))  # 1.2 MiB in 8 bits
    answer, peers = in_one_micro_batch(swarm, wire, hidden)
    assert refusals(peers) == {}
    per_value = LOSSY_CODES[wire].bytes_per_value
    for peer in peers.values():
        assert peer.bytes_sent > 2**20
        assert peer.bytes_sent == pytest.approx(per_value * hidden.numel(), rel=0.01)
        assert peer.bytes_received == pytest.approx(per_value * hidden.numel(), rel=0.01)
    exact, _ = in_one_micro_batch(swarm, None, hidden)
    assert float((answer - exact).abs().mean()) < 0.2 * float(exact.std())

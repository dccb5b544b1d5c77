"""The calls as hivemind sees them, and streams over a real swarm."""

import asyncio

import pytest
import torch
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from petals_eval.config import SwarmSettings
from petals_eval.errors import PeerAnswerError, PeerRefusedError
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm.rpc import TransformerConnectionHandler, receive, tensor_parts, together


def test_hivemind_takes_the_streams_for_streams():
    TransformerConnectionHandler._collect_rpc_handlers()
    handlers = {handler.method_name: handler for handler in TransformerConnectionHandler._rpc_handlers}
    assert sorted(handlers) == ["rpc_forward", "rpc_forward_stream", "rpc_info"]
    for name, handler in handlers.items():
        assert handler.stream_input == handler.stream_output == (name == "rpc_forward_stream")


def test_a_call_over_one_mebibyte_streams(realdata):
    hidden = torch.randn(10, 600, 64, generator=torch.Generator().manual_seed(0))
    with LocalSwarm(realdata / "stories260K-hf", spans=[(0, 5)], mode="thread", max_batch_size=6000) as swarm:
        peers = tuple(swarm.initial_peers)
        with SwarmConnection.connect(SwarmSettings(initial_peers=peers, max_tokens_per_call=6000)) as connection:
            streamed = connection.remote_sequential(swarm.dht_prefix, 5)(hidden)
        with SwarmConnection.connect(SwarmSettings(initial_peers=peers, max_tokens_per_call=600)) as connection:
            expected = connection.remote_sequential(swarm.dht_prefix, 5)(hidden)
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-4)


def test_a_timeout_around_calls_of_which_one_failed_is_still_a_timeout():
    async def refused():
        raise PeerRefusedError("no")

    async def hang():
        await asyncio.sleep(60)

    async def run():
        async with asyncio.timeout(0.05):
            with pytest.raises(PeerRefusedError):
                await together([hang(), refused(), refused()])
            assert asyncio.all_tasks() == {asyncio.current_task()}
            await hang()

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_messages_of_a_bare_stream_are_bounded():
    def framed(mark: bytes, content: bytes, length: int | None = None) -> bytes:
        return mark + (len(content) if length is None else length).to_bytes(8, "big") + content

    async def read(sent: bytes):
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        reader.feed_eof()
        return await receive(reader, runtime_pb2.ExpertResponse, 100)

    answer = runtime_pb2.ExpertResponse(metadata=b"hello")
    assert asyncio.run(read(framed(b"\0", answer.SerializeToString()))) == answer
    with pytest.raises(PeerRefusedError, match=r"^out of memory$"):
        asyncio.run(read(framed(b"\1", RPCError(message="out of\nmemory").SerializeToString())))
    for sent in (framed(b"\0", b"", 1 << 40), framed(b"\2", b"")):
        with pytest.raises(PeerAnswerError, match=r"at most 100 bytes, found one of 1099511627776|the mark b'\\x02'"):
            asyncio.run(read(sent))
    with pytest.raises(asyncio.IncompleteReadError):
        asyncio.run(read(framed(b"\0", b"abc", 10)))


def test_a_streamed_answer_that_never_ends_is_left():
    sent = []

    async def answers(count: int):
        for _ in range(count):
            sent.append(runtime_pb2.ExpertResponse(tensors=[runtime_pb2.Tensor(buffer=b"x" * 1000)]))
            yield sent[-1]

    assert len(asyncio.run(tensor_parts(answers(3), limit=4000))) == 3
    sent.clear()
    with pytest.raises(PeerAnswerError, match="at most 4000 bytes"):
        asyncio.run(tensor_parts(answers(10**9), limit=4000))
    assert len(sent) == 4

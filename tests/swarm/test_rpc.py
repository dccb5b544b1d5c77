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
from petals_eval.swarm.transport.rpc import as_peer_errors, receive, streamed, together


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


class Written:
    """The writing end of a stream that goes nowhere."""

    def __init__(self):
        self.sent, self.is_closed = b"", False

    def write(self, part):
        self.sent += part

    async def drain(self):
        await asyncio.sleep(0)

    def close(self):
        self.is_closed = True


def framed(message, length=None):
    content = message.SerializeToString()
    return b"\0" + (len(content) if length is None else length).to_bytes(8, "big") + content


@pytest.mark.parametrize(
    ("sent", "error", "says"),
    [
        (
            framed(runtime_pb2.ExpertResponse(tensors=[runtime_pb2.Tensor(buffer=bytes(1000))])) * 9,
            PeerAnswerError,
            None,
        ),
        (framed(runtime_pb2.ExpertResponse()) * 100, PeerAnswerError, "goes on after"),
        (
            framed(runtime_pb2.ExpertResponse(), length=1 << 40),
            PeerAnswerError,
            "at most 4000 bytes, found one of 1099",
        ),
        (framed(runtime_pb2.ExpertResponse(metadata=b"hello"))[:-2], EOFError, None),
    ],
    ids=["long", "endless and empty", "one long message", "cut"],
)
def test_a_streamed_answer_has_a_bound_that_no_peer_sets(sent, error, says):
    async def read():
        reader, writer = asyncio.StreamReader(), Written()
        reader.feed_data(sent)
        reader.feed_eof()
        try:
            return await streamed((reader, writer), [runtime_pb2.ExpertRequest(uid="m.0")] * 3, limit=4000)
        finally:
            assert writer.is_closed

    with pytest.raises(error, match=says):
        asyncio.run(read())


def test_a_streamed_answer_is_read_to_its_end():
    async def read():
        reader, writer = asyncio.StreamReader(), Written()
        for _ in range(3):
            reader.feed_data(framed(runtime_pb2.ExpertResponse(tensors=[runtime_pb2.Tensor(buffer=bytes(1000))])))
        asyncio.get_running_loop().call_later(0.05, reader.feed_eof)
        parts = await streamed((reader, writer), [runtime_pb2.ExpertRequest(uid="m.0")] * 2, limit=4000)
        return parts, writer.sent

    parts, sent = asyncio.run(read())
    assert len(parts) == 3
    assert sent.count(b"m.0") == 2


def test_an_answer_that_is_no_message_is_the_peers_fault():
    """protobuf's DecodeError is no ValueError: it ended the run as a bug of ours."""

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(b"\0" + (3).to_bytes(8, "big") + b"\xff\xff\xff")
        await receive(reader, runtime_pb2.ExpertResponse, 100)

    with pytest.raises(PeerRefusedError, match="its answer is no message"), as_peer_errors(1):
        asyncio.run(read())

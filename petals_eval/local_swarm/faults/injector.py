"""Where faults act: on a server's arithmetic, on its messages and on what it says of itself."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable

import torch
from hivemind.proto import runtime_pb2

from petals_eval.local_swarm.faults.catalog import (
    BrokenDecoder,
    Crash,
    FlippedBit,
    InfoOnly,
    Noise,
    NotFinite,
    OtherWeights,
    Oversized,
    Refuse,
    Reset,
    Slow,
    StaleRecord,
    Swapped,
    TrainingMode,
    Truncated,
    WrongDtype,
    WrongShape,
)
from petals_eval.local_swarm.faults.switch import FaultSwitch
from petals_eval.local_swarm.work import Compute, Middleware, Work
from petals_eval.model.blocks import BlockSpan

__all__ = ["FaultInjector", "wait_forever", "with_flipped_bit"]

_EIGHT_BIT = (
    runtime_pb2.CompressionType.UNIFORM_8BIT,
    runtime_pb2.CompressionType.QUANTILE_8BIT,
    runtime_pb2.CompressionType.BLOCKWISE_8BIT,
)

_MAX_REMEMBERED_SHAPES = 64
"""Answers that `Swapped` keeps at most, one of each shape."""


class FaultInjector(FaultSwitch):
    """The faults of one server. Used from its event loop only.

    crash: ends the server at once. reset: breaks the connection to a client (peer id, base58).
    """

    def __init__(self, crash: Callable[[], Awaitable[None]], reset: Callable[[str], Awaitable[None]]):
        super().__init__()
        self._crash = crash
        self._reset = reset
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}  # the last one of each shape
        self._other_models: dict[int, BlockSpan] = {}  # by seed

    # -- Around the arithmetic.

    def middleware(self, blocks: BlockSpan) -> Middleware:
        """Return the middleware of a server of these blocks."""

        async def inject(work: Work, compute: Compute) -> torch.Tensor:
            return await self._compute(blocks, work, compute)

        return inject

    async def _compute(self, blocks: BlockSpan, work: Work, compute: Compute) -> torch.Tensor:
        if not self.has_any:
            return await compute(work)
        asked = work.hidden.contiguous().view(torch.uint8).numpy().tobytes()
        if self.hits_call(Crash, asked):
            await self._crash()
            await wait_forever()
        if self.hangs("before") or self.hits_call(InfoOnly):
            await wait_forever()
        if refusal := self.hits_call(Refuse, asked):
            raise RuntimeError(refusal[0].words)
        if stale := self.active(StaleRecord):
            self._count(stale)
            raise RuntimeError("Remote peer does not serve these blocks")
        if slow := self.hits_call(Slow, asked):
            await asyncio.sleep(slow[0].delay)
        if self._find(TrainingMode):  # for this call and for those that are computed beside it
            training = self.hits_call(TrainingMode)
            blocks.drop_out(training[0].dropout if training else 0.0)
        other = self.hits_call(OtherWeights, asked)
        if other and work.cache is None:
            answer = await asyncio.to_thread(self._by_another_model, blocks, other[0].seed, work)
        else:
            answer = await compute(work)
        return self._corrupted(answer, asked)

    def _by_another_model(self, blocks: BlockSpan, seed: int, work: Work) -> torch.Tensor:
        if seed not in self._other_models:
            self._other_models[seed] = blocks.shuffled(seed)
        span = work.span
        return self._other_models[seed].forward(work.hidden, work.prompts, start=span.start, stop=span.stop)

    def _corrupted(self, answer: torch.Tensor, asked: bytes) -> torch.Tensor:
        """Return a well-formed answer with what is to be wrong in it."""
        if noise := self.hits_call(Noise, asked):
            draws = torch.Generator().manual_seed(noise[1].randrange(2**31))
            usual = answer.float().square().mean(dim=-1, keepdim=True).sqrt()
            answer = (answer + noise[0].size * usual * torch.randn(answer.shape, generator=draws)).to(answer.dtype)
        if flipped := self.hits_call(FlippedBit, asked):
            answer = with_flipped_bit(answer, flipped[1].randrange(answer.numel()), flipped[0].bit)
        if bad := self.hits_call(NotFinite, asked):
            answer = answer.clone()
            answer.view(-1)[bad[1].randrange(answer.numel())] = float("nan")
        if self._find(Swapped):
            before = self._answers.get(tuple(answer.shape))
            if len(self._answers) < _MAX_REMEMBERED_SHAPES or before is not None:
                self._answers[tuple(answer.shape)] = answer
            if before is not None and self.hits_call(Swapped):
                answer = before
        return answer

    # -- Around the messages.

    def check_codes(self, messages: Iterable[runtime_pb2.Tensor]) -> None:
        """Raise TypeError where a request comes in a code that the server cannot read."""
        if any(message.compression in _EIGHT_BIT for message in messages) and self.hits_call(BrokenDecoder):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")  # NumPy's words

    async def tampered(self, message: runtime_pb2.Tensor, remote: str) -> runtime_pb2.Tensor:
        """Return the answer that is sent to a client (peer id, base58) in the place of `message`; or never return."""
        if not self.has_any:
            return message
        if self.hits_call(Reset):
            await self._reset(remote)
            await wait_forever()
        message = copy.copy(message)
        if cut := self.hits_call(Truncated):
            message.buffer = message.buffer[: int(len(message.buffer) * cut[0].share_left)]
        if large := self.hits_call(Oversized):
            message.buffer = message.buffer * large[0].times
        if self.hits_call(WrongShape):
            batch, seq, size = message.size
            itemsize = len(message.buffer) // max(1, batch * seq * size)
            message.buffer = message.buffer[: batch * (seq - 1) * size * itemsize]
            del message.size[:]
            message.size.extend((batch, seq - 1, size))
        if self.hits_call(WrongDtype):
            message.dtype = "float16" if message.dtype == "float32" else "float32"
            values = len(message.buffer) // (4 if message.dtype == "float16" else 2)
            message.buffer = bytes(values * (2 if message.dtype == "float16" else 4))
        return message


async def wait_forever() -> None:
    """Wait until the task is cancelled, as the answer of a call that hangs."""
    await asyncio.Event().wait()


def with_flipped_bit(values: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    """Return `values` with a bit of the one at `index` flipped; bit 0 is the sign."""
    integers = {2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    flipped = values.clone().contiguous()
    flat = flipped.view(-1).view(integers)
    mask = 1 << (8 * values.dtype.itemsize - 1 - bit)
    if bit == 0:
        mask = -mask  # the sign bit of a signed integer
    flat[index] ^= mask
    return flipped

"""Where faults act: on a server's arithmetic, on its messages and on what it says of itself."""

import asyncio
import copy
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from hivemind.proto import runtime_pb2

from petals_eval.local_swarm.faults.catalog import (
    BrokenDecoder,
    Crash,
    Fault,
    FaultCount,
    FlippedBit,
    Hang,
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
from petals_eval.local_swarm.work import Compute, Middleware, Work
from petals_eval.model.blocks import BlockSpan

__all__ = ["FaultInjector", "wait_forever"]

F = TypeVar("F", bound=Fault)

_ERRORS = {
    "overload": "Server is overloaded: all handlers are busy",
    "batch_size": "Task size greater than max_batch_size (1), it can't be processed",
    "not_served": "Remote peer does not serve this block any more",
    "adapter": "adapter not found",
    "cache": "Could not allocate 1073741824 bytes, max cache size = 1024 bytes, 1024 already allocated",
}
"""The errors of Petals servers, word for word as far as clients read them."""

_EIGHT_BIT = (
    runtime_pb2.CompressionType.UNIFORM_8BIT,
    runtime_pb2.CompressionType.QUANTILE_8BIT,
    runtime_pb2.CompressionType.BLOCKWISE_8BIT,
)

_MAX_REMEMBERED_SHAPES = 64
"""Answers that `Swapped` keeps at most, one of each shape."""


class _ActiveFault(Generic[F]):
    """A fault that is switched on, with what it has seen since."""

    def __init__(self, fault: F):
        self.fault = fault
        self.draws = random.Random(f"{fault.seed} {type(fault).__name__}")
        self.since = time.monotonic()
        self.calls = 0
        self.hits = 0

    def is_on(self) -> bool:
        seconds, at_most = self.fault.seconds, self.fault.at_most
        lasts = seconds is None or time.monotonic() - self.since < seconds
        return lasts and (at_most is None or self.hits < at_most)

    def draws_for(self, asked: bytes | None) -> random.Random:
        """Return the source of this call's draws, which goes by what is asked if the fault repeats."""
        if not self.fault.repeats or asked is None:
            return self.draws
        return random.Random(f"{self.fault.seed} {zlib.crc32(asked)}")


class FaultInjector:
    """The faults of one server. Used from its event loop only.

    crash: ends the server at once. reset: breaks the connection to a client (peer id, base58).
    """

    def __init__(self, crash: Callable[[], Awaitable[None]], reset: Callable[[str], Awaitable[None]]):
        self._crash = crash
        self._reset = reset
        self._active: list[_ActiveFault] = []
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}  # the last one of each shape
        self._other_models: dict[int, BlockSpan] = {}  # by seed
        self._calls_in_flight = 0
        self.counts: dict[str, FaultCount] = {}  # by the names of the faults, since the server started

    def switch(self, faults: Sequence[Fault]) -> None:
        """Have these faults and no others from now on."""
        self._active = [_ActiveFault(fault) for fault in faults]

    # -- Which faults act.

    def active(self, kind: type[F]) -> F | None:
        """Return the fault of this kind that is on now, or None; it is not counted."""
        found = self._find(kind)
        return None if found is None or not found.is_on() else found.fault

    def active_in_record(self, kind: type[F]) -> F | None:
        """Return the fault of this kind that is on now, or None, and count it: it goes into an announcement."""
        fault = self.active(kind)
        if fault is not None:
            self._count(fault)
        return fault

    def hits_call(self, kind: type[F], asked: bytes | None = None) -> tuple[F, random.Random] | None:
        """Return the fault of this kind with a source for its draws if it hits this call, and count it; else None.

        asked: the bytes of what the call asks, for faults that repeat.
        """
        found = self._find(kind)
        if found is None:
            return None
        found.calls += 1
        if not found.is_on() or found.calls <= found.fault.after:
            return None
        draws = found.draws_for(asked)
        if draws.random() >= found.fault.share:
            return None
        found.hits += 1
        self._count(found.fault)
        return found.fault, draws

    def hangs(self, where: str) -> bool:
        """Whether a `Hang` at this place hits the call, whose answer must then be waited for for ever."""
        found = self._find(Hang)
        return found is not None and found.fault.where == where and self.hits_call(Hang) is not None

    def _count(self, fault: Fault) -> None:
        count = self.counts.setdefault(fault.name, FaultCount())
        count.times += 1
        count.in_flight += self._calls_in_flight > 0

    def _find(self, kind: type[F]) -> _ActiveFault[F] | None:
        return next((active for active in self._active if isinstance(active.fault, kind)), None)

    @contextmanager
    def call_in_flight(self) -> Iterator[None]:
        """Count faults that act in the block as ones that met a client's call."""
        self._calls_in_flight += 1
        try:
            yield
        finally:
            self._calls_in_flight -= 1

    # -- Around the arithmetic.

    def middleware(self, blocks: BlockSpan) -> Middleware:
        """Return the middleware of a server of these blocks."""

        async def inject(work: Work, compute: Compute) -> torch.Tensor:
            return await self._compute(blocks, work, compute)

        return inject

    async def _compute(self, blocks: BlockSpan, work: Work, compute: Compute) -> torch.Tensor:
        if not self._active:
            return await compute(work)
        asked = work.hidden.contiguous().view(torch.uint8).numpy().tobytes()
        if self.hits_call(Crash, asked):
            await self._crash()
            await wait_forever()
        if self.hangs("before") or self.hits_call(InfoOnly):
            await wait_forever()
        if refusal := self.hits_call(Refuse, asked):
            raise RuntimeError(refusal[0].text or _ERRORS[refusal[0].reason])
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
            answer = _with_flipped_bit(answer, flipped[1].randrange(answer.numel()), flipped[0].bit)
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
        if not self._active:
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


def _with_flipped_bit(values: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    """Return `values` with a bit of the one at `index` flipped; bit 0 is the sign."""
    integers = {2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    flipped = values.clone().contiguous()
    flat = flipped.view(-1).view(integers)
    mask = 1 << (8 * values.dtype.itemsize - 1 - bit)
    if bit == 0:
        mask = -mask  # the sign bit of a signed integer
    flat[index] ^= mask
    return flipped

"""Where faults act: on a server's arithmetic, on its messages and on what it says of itself."""

import asyncio
import copy
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from hivemind.proto import runtime_pb2

from petals_eval.local_swarm.faults.catalog import (
    Crash,
    Fault,
    FlippedBit,
    Hang,
    Hits,
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
from petals_eval.local_swarm.server.compute import Compute, Work
from petals_eval.model.blocks import BlockSpan

__all__ = ["Switchboard"]

F = TypeVar("F", bound=Fault)

# What Petals servers say, word for word as far as clients read it.
_WORDS = {
    "overload": "Server is overloaded: all handlers are busy",
    "batch_size": "Task size greater than max_batch_size (1), it can't be processed",
    "not_served": "Remote peer does not serve this block any more",
    "adapter": "adapter not found",
    "cache": "Could not allocate 1073741824 bytes, max cache size = 1024 bytes, 1024 already allocated",
}


class _Active:
    """A fault that is switched on, and what it has seen."""

    def __init__(self, fault: Fault):
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
        """Of a fault that repeats: by what is asked."""
        if not self.fault.repeats or asked is None:
            return self.draws
        return random.Random(f"{self.fault.seed} {zlib.crc32(asked)}")


class Switchboard:
    """The faults of one server. Used from its event loop only.

    crash: ends the server at once. reset: breaks the connection to a client (peer id, base58).
    """

    def __init__(
        self, crash: Callable[[], Awaitable[None]], reset: Callable[[str], Awaitable[None]], calls_to_forget: int = 64
    ):
        self._crash = crash
        self._reset = reset
        self._active: list[_Active] = []
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}  # the last one of each shape
        self._others: dict[int, BlockSpan] = {}  # another model's weights, by seed
        self._most_answers = calls_to_forget
        self._in_flight = 0
        self.hits: dict[str, Hits] = {}

    def switch(self, faults: Sequence[Fault]) -> None:
        """These faults and no others from now on."""
        self._active = [_Active(fault) for fault in faults]

    # -- which faults act

    def of(self, kind: type[F]) -> F | None:
        """The fault of this kind that is on now, whatever calls there are. For what a server says of itself."""
        active = self._find(kind)
        return None if active is None or not active.is_on() else active.fault  # type: ignore[return-value]

    def tells(self, kind: type[F]) -> F | None:
        """The same, counted: it goes into an announcement."""
        fault = self.of(kind)
        if fault is not None:
            self.count(fault)
        return fault

    def acts(self, kind: type[F], asked: bytes | None = None) -> tuple[F, random.Random] | None:
        """The fault of this kind, if it hits this call; counted."""
        active = self._find(kind)
        if active is None:
            return None
        active.calls += 1
        if not active.is_on() or active.calls <= active.fault.after:
            return None
        draws = active.draws_for(asked)
        if draws.random() >= active.fault.share:
            return None
        active.hits += 1
        self.count(active.fault)
        return active.fault, draws  # type: ignore[return-value]

    def count(self, fault: Fault) -> None:
        """That it acted."""
        name: str = getattr(fault, "name", type(fault).__name__)
        hits = self.hits.setdefault(name, Hits())
        hits.times += 1
        hits.in_flight += self._in_flight > 0

    def _find(self, kind: type[Fault]) -> _Active | None:
        return next((active for active in self._active if isinstance(active.fault, kind)), None)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A client's call."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    # -- around the arithmetic

    def around(self, span: BlockSpan) -> Callable[[Work, Compute], Awaitable[torch.Tensor]]:
        """Middleware for a server of these blocks."""

        async def layer(work: Work, compute: Compute) -> torch.Tensor:
            return await self._compute(span, work, compute)

        return layer

    async def _compute(self, span: BlockSpan, work: Work, compute: Compute) -> torch.Tensor:
        if not self._active:
            return await compute(work)
        asked = work.hidden.contiguous().view(torch.uint8).numpy().tobytes()
        if self.acts(Crash, asked):
            await self._crash()
            await _for_ever()
        hang = self._find(Hang)
        if hang is not None and isinstance(hang.fault, Hang) and hang.fault.where == "before" and self.acts(Hang):
            await _for_ever()
        if self.acts(InfoOnly):
            await _for_ever()
        if refusal := self.acts(Refuse, asked):
            raise RuntimeError(refusal[0].text or _WORDS[refusal[0].words])
        if stale := self.of(StaleRecord):
            self.count(stale)
            raise RuntimeError("Remote peer does not serve these blocks")
        if slow := self.acts(Slow, asked):
            await asyncio.sleep(slow[0].delay)
        self._train(span)
        other = self.acts(OtherWeights, asked)
        if other and work.cache is None:
            blocks = self._of_another_model(span, other[0].seed)
            answer = await asyncio.to_thread(
                blocks.forward, work.hidden, work.prompts, first=work.first, last=work.last
            )
        else:
            answer = await compute(work)
        return self._wrong(answer, asked)

    def _train(self, span: BlockSpan) -> None:
        """Training mode or not, for this call and those beside it."""
        if self._find(TrainingMode) is None:
            return
        training = self.acts(TrainingMode)
        span.drop_out(training[0].dropout if training else 0.0)

    def _of_another_model(self, span: BlockSpan, seed: int) -> BlockSpan:
        if seed not in self._others:
            self._others[seed] = span.shuffled(seed)
        return self._others[seed]

    def _wrong(self, answer: torch.Tensor, asked: bytes) -> torch.Tensor:
        """A well-formed answer with something wrong in it."""
        if noise := self.acts(Noise, asked):
            draws = torch.Generator().manual_seed(noise[1].randrange(2**31))
            usual = answer.float().square().mean(dim=-1, keepdim=True).sqrt()
            answer = (answer + noise[0].size * usual * torch.randn(answer.shape, generator=draws)).to(answer.dtype)
        if flipped := self.acts(FlippedBit, asked):
            answer = _with_flipped_bit(answer, flipped[1].randrange(answer.numel()), flipped[0].bit)
        if bad := self.acts(NotFinite, asked):
            answer = answer.clone()
            answer.view(-1)[bad[1].randrange(answer.numel())] = float("nan")
        if self._find(Swapped) is not None:
            before = self._answers.get(tuple(answer.shape))
            if len(self._answers) < self._most_answers or before is not None:
                self._answers[tuple(answer.shape)] = answer
            if before is not None and self.acts(Swapped):
                answer = before
        return answer

    # -- around the messages

    async def sending(self, message: runtime_pb2.Tensor, remote: str) -> runtime_pb2.Tensor:
        """An answer on its way to a client: perhaps another, perhaps none."""
        if not self._active:
            return message
        if self.acts(Reset):
            await self._reset(remote)
            await _for_ever()
        message = copy.copy(message)
        if cut := self.acts(Truncated):
            message.buffer = message.buffer[: int(len(message.buffer) * cut[0].share_left)]
        if large := self.acts(Oversized):
            message.buffer = message.buffer * large[0].times
        if self.acts(WrongShape):
            batch, seq, size = message.size
            itemsize = len(message.buffer) // max(1, batch * seq * size)
            message.buffer = message.buffer[: batch * (seq - 1) * size * itemsize]
            del message.size[:]
            message.size.extend((batch, seq - 1, size))
        if self.acts(WrongDtype):
            message.dtype = "float16" if message.dtype == "float32" else "float32"
            values = len(message.buffer) // (4 if message.dtype == "float16" else 2)
            message.buffer = bytes(values * (2 if message.dtype == "float16" else 4))
        return message

    def hangs_in_mid_answer(self) -> bool:
        hang = self._find(Hang)
        if hang is None or not isinstance(hang.fault, Hang) or hang.fault.where != "middle":
            return False
        return self.acts(Hang) is not None

    async def for_ever(self) -> None:
        await _for_ever()


async def _for_ever() -> None:
    await asyncio.Event().wait()


def _with_flipped_bit(values: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    """bit: counted from the sign."""
    integers = {2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    flipped = values.clone().contiguous()
    flat = flipped.view(-1).view(integers)
    mask = 1 << (8 * values.dtype.itemsize - 1 - bit)
    if bit == 0:
        mask = -mask  # the sign bit of a signed integer
    flat[index] ^= mask
    return flipped

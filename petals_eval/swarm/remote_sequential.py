"""RemoteSequential: the swarm's blocks as a torch module that computes no gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from petals_eval.config import SwarmSettings
from petals_eval.errors import CallerError, ExampleError
from petals_eval.swarm.calls import RemoteCalls
from petals_eval.swarm.checked_calls import CheckedCalls
from petals_eval.swarm.connection import SwarmConnection
from petals_eval.swarm.directory import Directory
from petals_eval.swarm.gradients import refuse_gradients
from petals_eval.swarm.inference_session import InferenceSession
from petals_eval.swarm.peers import PeerBook, PeerHistory
from petals_eval.swarm.pipeline import USUAL_MAX_TOKENS, Pipeline, ServedHop, SwarmStatus
from petals_eval.swarm.records import Snapshot

__all__ = ["Computed", "RemoteSequential", "Work"]

T = TypeVar("T")
_Answer = tuple[torch.Tensor, tuple[ServedHop, ...]]


@dataclass(frozen=True, eq=False)
class Work(Generic[T]):
    """A micro-batch on its way out.

    hidden: (batch, seq, hidden); prompts: (blocks, batch or 1, prefix, hidden) or None.
    """

    tag: T
    hidden: torch.Tensor
    prompts: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Computed(Generic[T]):
    """A micro-batch on its way back.

    hidden: (batch, seq, hidden) in the last server's dtype; hops: who computed it, in order.
    """

    tag: T
    hidden: torch.Tensor
    hops: tuple[ServedHop, ...]


class RemoteSequential(nn.Module):
    """Transformer blocks on other people's machines.

        blocks = connection.remote_sequential("Llama-2-70b-hf", num_blocks=80)
        hidden = blocks(hidden)                     # (batch, seq, hidden), same shape and dtype back
        hidden = blocks[:40](hidden, prompts)       # the first forty, with deep prompts (40, 1, prefix, hidden)

    No autograd: a hidden state that requires grad under enabled grad is refused with GradientError.
    """

    def __init__(
        self, connection: SwarmConnection, directory: Directory, pipeline: Pipeline, first: int, last: int
    ) -> None:
        super().__init__()
        self._connection = connection
        self._directory = directory
        self._pipeline = pipeline
        self.first = first
        self.last = last

    @classmethod
    def open(cls, connection: SwarmConnection, dht_prefix: str, num_blocks: int) -> "RemoteSequential":
        """All blocks of the model announced under `dht_prefix`. Reads the directory once."""
        settings = connection.settings
        directory = Directory(connection.dht, dht_prefix, num_blocks, settings)
        peers = PeerBook(settings)
        calls = CheckedCalls(RemoteCalls(connection.p2p, dht_prefix, settings), peers, settings)
        pipeline = Pipeline(calls, directory, peers, settings)
        connection.run(directory.refresh)
        connection.start_background(directory.keep_fresh)
        return cls(connection, directory, pipeline, 0, num_blocks)

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int | slice) -> "RemoteSequential":
        """The blocks a:b as a module over the same connection."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"block {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise CallerError(f"blocks run in order: expected a slice with step 1, found step {step}")
        return RemoteSequential(
            self._connection, self._directory, self._pipeline, self.first + start, self.first + max(start, stop)
        )

    def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Run hidden (batch, seq, hidden) through the blocks; the same shape, dtype and device come back.

        prompts: (len(self), batch or 1, prefix, hidden), added to the first positions before each block, or None.
        Rows are split below the servers' token limit, and the parts are in flight together.
        Raises GradientError, CallerError for misshapen tensors, SwarmError when the swarm cannot.
        """
        refuse_gradients(hidden, prompts)
        self._check_shapes(hidden, prompts)
        if len(self) == 0 or hidden.numel() == 0:
            return hidden
        rows = max(1, self._rows_per_part(hidden))
        work = (
            Work(start, hidden[start : start + rows], _rows_of(prompts, slice(start, start + rows)))
            for start in range(0, hidden.shape[0], rows)
        )
        parts = {computed.tag: computed.hidden for computed in self.stream(work)}
        joined = torch.cat([parts[start] for start in sorted(parts)])
        return joined.to(device=hidden.device, dtype=hidden.dtype)

    def stream(
        self,
        work: Iterable[Work[T]],
        *,
        window: int | None = None,
        on_tick: Callable[[], object] | None = None,
        on_error: Callable[[T, ExampleError], Iterable[Work[T]]] | None = None,
        tick: float = 0.2,
    ) -> Iterator[Computed[T]]:
        """Send micro-batches and yield them as they come back, in any order.

        At most `window` (default: the settings') are in flight; the next one is taken from `work` only when one has
        come back, so memory is bounded by the window. `on_tick` is called about every `tick` seconds, and whenever one
        comes back. The first error cancels the rest and is raised; but for a micro-batch that nobody can compute
        `on_error` says what to send in its place, if anything.
        """
        window = window or self.settings.window
        pending: dict[Future[_Answer], T] = {}
        source = iter(work)
        again: list[Work[T]] = []
        exhausted = False
        try:
            while True:
                while (again or not exhausted) and len(pending) < window:
                    item = again.pop() if again else next(source, None)
                    if item is None:
                        exhausted = True
                        break
                    refuse_gradients(item.hidden, item.prompts)
                    pending[self._send(item)] = item.tag
                    del item
                if not pending:
                    return
                done = wait(pending, timeout=tick, return_when=FIRST_COMPLETED).done
                if on_tick is not None:
                    on_tick()
                failed = {} if on_error is None else _that_nobody_can_compute(done)
                done.difference_update(failed)
                while done:
                    yield _computed(pending, done.pop())
                for future, error in failed.items():
                    again += on_error(pending.pop(future), error) if on_error is not None else ()
        finally:
            for future in pending:
                future.cancel()

    def _send(self, work: Work[Any]) -> "Future[_Answer]":
        """Start a micro-batch on its way. Its hidden states are handed over: whoever waits for the answer, and the
        event loop, would otherwise keep them until it is there."""
        cargo = [work.hidden.detach()]
        prompts = None if work.prompts is None else work.prompts.detach()

        async def forward() -> _Answer:
            return await self._pipeline.forward(cargo.pop(), prompts, self.first, self.last)

        return self._connection.start(forward)

    def inference_session(self, max_length: int, *, batch: int = 1) -> InferenceSession:
        """A session through the blocks, for `batch` rows of at most `max_length` positions; use it with `with`.

        Nothing is sent before its first step, which reserves the servers' caches.
        """
        if batch < 1 or max_length < 1:
            raise CallerError(f"expected a batch and a max_length of at least 1, found {batch} and {max_length}")
        return InferenceSession(
            self._connection, self._pipeline.session(self.first, self.last, batch=batch, max_length=max_length)
        )

    def status(self) -> SwarmStatus:
        """Retries, servers used and what is being waited for."""
        return self._pipeline.status()

    def warn_of_dropout(self, dropout: Mapping[str, float]) -> None:
        """What the model's config at home says of dropout in the blocks, to be named where servers answer unalike."""
        self._pipeline.config_dropout = dict(dropout)

    @property
    def snapshot(self) -> Snapshot:
        """The directory as last seen."""
        return self._directory.snapshot

    def refresh(self) -> Snapshot:
        """Look at the directory now."""
        return self._connection.run(self._directory.refresh)

    @property
    def histories(self) -> Mapping[str, PeerHistory]:
        """What was seen of each server since the connection was made, by peer id; it goes on changing."""
        return self._pipeline.peers.histories

    @property
    def settings(self) -> SwarmSettings:
        """The connection's."""
        return self._connection.settings

    @property
    def dht_prefix(self) -> str:
        """The name under which the servers announce these blocks."""
        return self._directory.dht_prefix

    def _rows_per_part(self, hidden: torch.Tensor) -> int:
        limit = self.settings.max_tokens_per_call or USUAL_MAX_TOKENS
        return int(limit // max(1, hidden.shape[1]))

    def _check_shapes(self, hidden: torch.Tensor, prompts: torch.Tensor | None) -> None:
        if hidden.ndim != 3 or not hidden.is_floating_point():
            raise CallerError(
                "expected hidden states (batch, seq, hidden) of a float dtype, "
                f"found {tuple(hidden.shape)} {hidden.dtype}"
            )
        if prompts is None:
            return
        expected = f"({len(self)}, 1 or {hidden.shape[0]}, at most {hidden.shape[1]}, {hidden.shape[2]})"
        if (
            prompts.ndim != 4
            or prompts.shape[0] != len(self)
            or prompts.shape[1] not in (1, hidden.shape[0])
            or prompts.shape[2] > hidden.shape[1]
            or prompts.shape[3] != hidden.shape[2]
        ):
            # A server skips the blocks beyond the prompts it is given without a word: count them here.
            raise CallerError(f"expected deep prompts {expected}, found {tuple(prompts.shape)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "RemoteSequential":
        return self  # a live connection cannot be copied; copies of a model share it

    def extra_repr(self) -> str:
        return f"blocks {self.first}:{self.last} of {self.dht_prefix!r}"


def _computed(pending: "dict[Future[_Answer], T]", future: "Future[_Answer]") -> Computed[T]:
    """The answer of a micro-batch that is back. A function of its own, so that nothing holds the answer but who gets
    it: a generator's variables live on while it waits for the next."""
    tag = pending.pop(future)
    hidden, hops = future.result()
    return Computed(tag, hidden, hops)


def _that_nobody_can_compute(done: "Iterable[Future[_Answer]]") -> "dict[Future[_Answer], ExampleError]":
    errors = ((future, future.exception()) for future in done)
    return {future: error for future, error in errors if isinstance(error, ExampleError)}


def _rows_of(prompts: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]

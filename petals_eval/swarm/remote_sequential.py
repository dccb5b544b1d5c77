"""RemoteSequential: the swarm's blocks as a torch module that computes no gradients."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from petals_eval.config import SwarmSettings
from petals_eval.errors import CallerError, ExampleError
from petals_eval.swarm.activations import Activations, refuse_gradients
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.directory.routing import hold_all
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.micro_batch import Computed, Failed, Work
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline, SwarmStatus
from petals_eval.swarm.sessions.inference_session import InferenceSession
from petals_eval.swarm.sessions.room import leaves_others
from petals_eval.swarm.stream import BlockingStream
from petals_eval.swarm.trust.arbiter import BlocksAtHome
from petals_eval.swarm.trust.audit import AuditProgress
from petals_eval.swarm.wire.records import Snapshot
from petals_eval.swarm.wire.span import Span

__all__ = ["RemoteSequential"]

T = TypeVar("T")


class RemoteSequential(nn.Module):
    """Transformer blocks on other people's machines.

        blocks = connection.remote_sequential("Llama-2-70b-hf", num_blocks=80)
        hidden = blocks(hidden)                     # (batch, seq, hidden), same shape and dtype back
        hidden = blocks[:40](hidden, prompts)       # the first forty, with deep prompts (40, 1, prefix, hidden)

    No autograd: a hidden state that requires grad under enabled grad is refused with GradientError.

    span: the blocks. settings, lanes: of the connection.
    """

    def __init__(self, loop: EventLoop, pipeline: Pipeline, directory: Directory, span: Span) -> None:
        super().__init__()
        self._loop = loop
        self._pipeline = pipeline
        self._directory = directory
        self.span = span
        self.settings: SwarmSettings = pipeline.peers.settings
        self.lanes = pipeline.lanes

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int | slice) -> "RemoteSequential":
        """Return one block, or the blocks of a slice, as a module over the same connection."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"block {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise CallerError(f"blocks run in order: expected a slice with step 1, found step {step}")
        span = Span(self.span.start + start, self.span.start + max(start, stop))
        return RemoteSequential(self._loop, self._pipeline, self._directory, span)

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
        rows = max(1, self.positions_at_once(hidden.shape[2], hidden.dtype) // max(1, hidden.shape[1]))
        parts = Activations(hidden, prompts).by_rows(rows)
        work = (Work(number, part.hidden, part.prompts) for number, part in enumerate(parts))
        answers = {computed.tag: computed.hidden for computed in self.stream(work)}
        joined = torch.cat([answers[number] for number in sorted(answers)])
        return joined.to(device=hidden.device, dtype=hidden.dtype)

    def stream(
        self,
        work: Iterable[Work[T]],
        *,
        window: int | None = None,
        on_tick: Callable[[], object] | None = None,
        on_error: Callable[[T, ExampleError], Iterable[Work[T]]] | None = None,
        tick: float = 0.2,
    ) -> Generator[Computed[T]]:
        """Send micro-batches and yield them as they come back, in any order.

        window: micro-batches in flight at most (default: the settings'; without one there, the servers' own windows
            decide, see `petals_eval.swarm.peers.window`). The next one is taken from `work` only when there is room for
            it, so memory is bounded.
        on_tick: called about every `tick` seconds, and whenever one comes back.
        on_error: says what to send in the place of a micro-batch that nobody can compute, if anything. Any other error,
            and without it this one too, cancels the rest and is raised.
        """

        again: list[Work[T]] = []

        def failed(failure: Failed[T]) -> None:
            if on_error is None or not isinstance(failure.error, ExampleError):
                raise failure.error
            again.extend(on_error(failure.tag, failure.error))

        source = iter(work)
        exhausted = False
        stream = BlockingStream[T](self._loop, self._pipeline, self.span, window or self.settings.window)
        with closing(stream):
            while True:
                if (again or not exhausted) and stream.has_room():
                    item = again.pop() if again else next(source, None)
                    if item is None:
                        exhausted = True
                        stream.end()
                        continue
                    refuse_gradients(item.hidden, item.prompts)
                    stream.send(item)
                    del item
                    timeout = 0.0
                elif stream.in_flight:
                    timeout = tick
                else:
                    return
                back = stream.next(timeout, failed)
                if on_tick is not None and (back or timeout):
                    on_tick()
                while back:
                    yield back.pop()  # held by nothing but who gets it: a generator's variables live on meanwhile

    def settle(self, *, on_tick: Callable[[], object] | None = None, tick: float = 0.2) -> None:
        """Wait until every audit of what was computed is done; `status()` then tells what they came to.

        on_tick: called about every `tick` seconds, and at the end.
        """
        future = self._loop.start(self._pipeline.audit.settle)
        try:
            while not wait([future], timeout=tick).done:
                if on_tick is not None:
                    on_tick()
            future.result()
        finally:
            future.cancel()
        if on_tick is not None:
            on_tick()

    def verify_at_home(self, blocks: BlocksAtHome) -> None:
        """Hold servers of these blocks against blocks at home, such as a `petals_eval.model.blocks.BlockSpan`."""
        self._pipeline.audit.keep_at_home(blocks)

    def replaceable(self, peer_ids: Iterable[str]) -> tuple[str, ...]:
        """Return which of these servers the others can do without, given up one after the other in this order."""
        left = {
            each.peer_id: each for each in self._pipeline.quarantine.trusted() if self.peers.of(each.peer_id).is_usable
        }
        found = []
        for peer_id in peer_ids:
            others = [each for each in left.values() if each.peer_id != peer_id]
            if peer_id in left and hold_all(others, self.span):
                del left[peer_id]
                found.append(peer_id)
        return tuple(found)

    @contextmanager
    def avoiding(self, peer_ids: Iterable[str]) -> Iterator[None]:
        """Let other servers do the work of the body: `replaceable` says without which ones that can be done."""
        avoided = [self.peers.of(peer_id) for peer_id in peer_ids]
        try:
            for peer in avoided:
                peer.is_avoided = True
            yield
        finally:
            for peer in avoided:
                peer.is_avoided = False

    def audit_progress(self) -> AuditProgress:
        """Return how much of what was computed was computed elsewhere, too."""
        return self._pipeline.audit.progress()

    def inference_session(self, max_length: int, *, batch: int = 1) -> InferenceSession:
        """Return a session through the blocks, for `batch` rows of at most `max_length` positions; use it with `with`.

        Nothing is sent before its first step, which reserves the servers' caches.
        """
        if batch < 1 or max_length < 1:
            raise CallerError(f"expected a batch and a max_length of at least 1, found {batch} and {max_length}")
        return InferenceSession(self._loop, self._pipeline.session(self.span, batch, max_length))

    def leaves_others(self, max_length: int, share: float) -> bool:
        """Return what `petals_eval.swarm.sessions.room` says of a session through these blocks."""
        return leaves_others(self.snapshot, self.peers, self.span, max_length, share)

    def status(self) -> SwarmStatus:
        """Return retries, servers used and what is being waited for."""
        return self._pipeline.status()

    def warn_of_dropout(self, dropout: Mapping[str, float]) -> None:
        """Say what the model's config at home says of dropout, to be named where servers answer unalike."""
        self._pipeline.quarantine.config_dropout = dict(dropout)

    def limit_steps(self, positions: int | None) -> None:
        """Compute rows of more positions in one call or not at all, and open no session for more; None: no limit.

        For models whose rotary angles go by the length of a call, so that steps would compute something else.
        """
        self._pipeline.peers.model_limits.steps_alike = positions

    @property
    def snapshot(self) -> Snapshot:
        """The directory as last seen."""
        return self._directory.snapshot

    def refresh(self) -> Snapshot:
        """Look at the directory now, and return what it says."""
        return self._loop.run(self._directory.refresh)

    @property
    def peers(self) -> PeerBook:
        """What was seen of each server since the connection was made, by peer id; it goes on changing."""
        return self._pipeline.peers

    @property
    def dht_prefix(self) -> str:
        """The name under which the servers announce these blocks."""
        return self._directory.dht_prefix

    def positions_at_once(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Return how many positions (rows x longest) of hidden states of this size and dtype to send at once."""
        return self._pipeline.positions_at_once(hidden_size, dtype)

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
        """Return what torch prints of the module."""
        return f"blocks {self.span} of {self.dht_prefix!r}"

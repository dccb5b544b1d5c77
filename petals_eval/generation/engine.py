"""Several texts at once, each a token further with every answer of the swarm.

In sessions a text's first step is its prompt, and each later one is one token: the servers keep what went before. Where
no server opens a session, or not for a text of this length, every token is a forward call of all that went before it.
"""

import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from petals_eval.errors import CallerError, ExampleError, NoSessionError, RequestTooLargeError, SwarmError
from petals_eval.generation.growing_text import GrowingText
from petals_eval.generation.next_token import TokenChoice, token_likelihoods
from petals_eval.model import evaluating
from petals_eval.tasks.requests import Request

if TYPE_CHECKING:
    from petals_eval.model import Adapter, LocalPart
    from petals_eval.swarm import InferenceSession, RemoteSequential, ServedHop

__all__ = ["GenerationPolicy", "GrowingRow", "Steps", "generate"]

_TICK = 0.2  # seconds between two looks around
_LOOK = 0.02  # seconds between two while a text waits until another one's session is open


@dataclass(frozen=True)
class GenerationPolicy:
    """How much of other people's caches texts may take, and when they do without. Times are seconds.

    share_left: of what a server's cache was ever seen to have free, for others: another session is opened only where
        so much is left. One of ours may always be open.
    patience: for which one text waits for a session while no other of ours has one, before it goes on by calls.
    rest: for which no other session is asked for then.
    """

    share_left: float = 0.5
    patience: float = 30.0
    rest: float = 120.0


class GrowingRow:
    """A request on its way to its text.

    text: what there is of it. hops: who computed any part of it.
    session, step, closing: while it goes through one, and what it waits for there.
    """

    def __init__(self, request: Request, text: GrowingText, choice: TokenChoice):
        self.request = request
        self.text = text
        self.choice = choice
        self.hops: dict[ServedHop, None] = {}
        self.session: InferenceSession | None = None
        self.step: Future[torch.Tensor] | None = None
        self.closing: Future[None] | None = None

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All tokens so far, those of the prompt and the new ones."""
        return (*self.request.input_ids, *self.text.tokens)

    @property
    def is_opening(self) -> bool:
        """Whether no server has given it a session yet."""
        return self.step is not None and self.session is not None and not self.session.servers

    @property
    def holds_session(self) -> bool:
        """Whether it has what another one may wait for."""
        return self.session is not None and not self.is_opening and self.session.seconds_waiting == 0


Steps = Callable[[Sequence[GrowingRow]], Generator[tuple[GrowingRow, torch.Tensor, "tuple[ServedHop, ...]"]]]
"""Computes all tokens of some rows by forward calls: each row with what the last block makes of its last position,
(hidden,), and who computed it. Rows that cannot be computed are left out, and whoever asked is told."""


def generate(
    requests: Iterable[Request],
    local: "LocalPart",
    blocks: "RemoteSequential",
    adapter: "Adapter | None",
    by_calls: Steps,
    *,
    on_failed: Callable[[Request, ExampleError], object],
    on_tick: Callable[[], object] = lambda: None,
    on_notice: Callable[[str], object] = lambda line: None,
) -> Generator[GrowingRow]:
    """Yield the rows of requests with a decoding as their texts are over, in any order.

    on_failed: told of each request that cannot be computed. on_tick: called a few times a second. on_notice: told what
    a person should know. Raises SwarmError.
    """
    work = _Generation(local, blocks, adapter, by_calls, on_failed, on_tick, on_notice)
    source = _Source(work.rows(requests))
    while True:
        left = yield from work.in_sessions(source)
        if not left and source.is_exhausted:
            return
        yield from work.by_calls(left, source)


class _Source:
    """Rows that have not begun."""

    def __init__(self, rows: Iterator[GrowingRow]):
        self._rows = rows
        self._next: GrowingRow | None = None
        self.is_exhausted = False

    def look(self) -> GrowingRow | None:
        """Return the next row and leave it where it is; None: there is none."""
        if self._next is None and not self.is_exhausted:
            self._next = next(self._rows, None)
            self.is_exhausted = self._next is None
        return self._next

    def take(self) -> GrowingRow | None:
        row, self._next = self.look(), None
        return row


class _Generation:
    def __init__(
        self,
        local: "LocalPart",
        blocks: "RemoteSequential",
        adapter: "Adapter | None",
        by_calls: Steps,
        on_failed: Callable[[Request, ExampleError], object],
        on_tick: Callable[[], object],
        on_notice: Callable[[str], object],
    ):
        self._local, self._blocks, self._adapter = local, blocks, adapter
        self._prefix = 0 if adapter is None else adapter.prefix_length
        deep_prompts = None if adapter is None else adapter.deep_prompts
        self._deep_prompts = None if deep_prompts is None else deep_prompts.to(local.dtype)
        self._steps = by_calls
        self._on_failed, self._on_tick, self._on_notice = on_failed, on_tick, on_notice
        self._patience = min(GenerationPolicy.patience, blocks.settings.deadline / 2)
        self._next_tick = float("-inf")
        self._at_once = blocks.settings.generation_rows
        self._ends = local.end_tokens()
        self._no_session_until = float("-inf")
        self._why = "no session", ""
        self._waits_for = ""
        self._said: set[str] = set()
        self._inbox: queue.SimpleQueue[tuple[GrowingRow, Future]] = queue.SimpleQueue()

    def rows(self, requests: Iterable[Request]) -> Iterator[GrowingRow]:
        for request in requests:
            decoding = request.decoding
            if decoding is None or not request.input_ids:
                raise CallerError("expected requests with a decoding and a token at least to go on from")
            try:
                self._local.check_request(request, self._prefix)
            except ExampleError as error:
                self._on_failed(request, error)
                continue
            text = GrowingText(decoding, self._local.tokenizer, self._ends)
            yield GrowingRow(request, text, TokenChoice(decoding, request.key, request.part))

    # -- in sessions

    def in_sessions(self, source: _Source) -> Generator[GrowingRow, None, list[GrowingRow]]:
        """Yield rows that are over; return those that have to go on by calls, once nothing is under way any more.

        Every session is over when this ends, however it does: what it reserved is other people's.
        """
        active: set[GrowingRow] = set()
        left: list[GrowingRow] = []
        try:
            while True:
                while (row := source.look()) is not None and self._may_begin(row, active, left):
                    source.take()
                    active.add(row)
                    self._begin(row)
                if not active:
                    return left
                is_full = row is None or len(active) >= self._at_once
                for returned, future in self._returned(_TICK if is_full else _LOOK):
                    if future is returned.closing:
                        active.discard(returned)
                    elif future is returned.step and self._received(returned, future, left):
                        yield returned
                self._tick()
                self._end_vain_waits(active, left)
        finally:
            self._abandon(active)

    def _tick(self) -> None:
        if time.monotonic() >= self._next_tick:
            self._on_tick()
            self._next_tick = time.monotonic() + _TICK / 2

    def _may_begin(self, row: GrowingRow, active: set[GrowingRow], left: list[GrowingRow]) -> bool:
        """Return whether to open a row's session now. One after the other: two that ask for the last room get none."""
        if len(active) >= self._at_once or len(left) >= self._at_once or time.monotonic() < self._no_session_until:
            return False
        if not all(other.holds_session or other.session is None for other in active):
            return False
        return not active or self._blocks.leaves_others(self._length(row), GenerationPolicy.share_left)

    def _length(self, row: GrowingRow) -> int:
        """Return the positions that a row may come to, which a session reserves."""
        return self._prefix + row.request.positions

    def _begin(self, row: GrowingRow) -> None:
        row.session = self._blocks.inference_session(self._length(row))
        with evaluating(self._local):
            hidden = self._local.embed(torch.tensor([row.input_ids], device="cpu"), self._adapter)
        self._step(row, row.session, hidden, self._deep_prompts)

    def _step(
        self, row: GrowingRow, session: "InferenceSession", hidden: torch.Tensor, prompts: torch.Tensor | None = None
    ) -> None:
        row.step = session.start_step(hidden, prompts)
        row.step.add_done_callback(lambda future: self._inbox.put((row, future)))

    def _returned(self, timeout: float) -> Iterator[tuple[GrowingRow, Future]]:
        """Yield what is back; nothing when nothing is within `timeout` seconds."""
        with suppress(queue.Empty):
            yield self._inbox.get(timeout=timeout)
            while True:
                yield self._inbox.get_nowait()

    def _received(self, row: GrowingRow, step: "Future[torch.Tensor]", left: list[GrowingRow]) -> bool:
        """Take the answer to a step; returns whether the row's text is over."""
        try:
            hidden = step.result()
        except RequestTooLargeError as error:  # too long for a session is not too long for calls
            left.append(self._detached(row))
            self._why = "too long", str(error)
        except NoSessionError as error:
            left.append(self._detached(row))
            self._rest_from_sessions(str(error))
        except ExampleError as error:
            self._on_failed(self._detached(row).request, error)
        else:
            return self._went_on(row, hidden[0, -1])
        return False

    def _went_on(self, row: GrowingRow, hidden: torch.Tensor) -> bool:
        """Choose the next token by what the last block makes of the last position, (hidden,), and send it; returns
        whether the text is over."""
        session = row.session
        try:
            with evaluating(self._local):
                logits = self._local.next_logits(hidden)
                token = row.choice.next(logits)
                decoding = row.request.decoding
                if decoding is not None and decoding.likeliest:
                    row.text.likelihoods.append(token_likelihoods(logits, token, decoding.likeliest))
                is_over = row.text.add(token) is not None
                following = None
                if session is not None and not is_over:
                    following = self._local.embed(torch.tensor([[token]], device="cpu"))
        except ExampleError as error:
            self._on_failed(self._detached(row).request, error)
            return False
        if session is not None and following is not None:
            self._step(row, session, following)
        elif is_over:
            self._detached(row, may_audit=True)
        return is_over

    def _detached(self, row: GrowingRow, *, may_audit: bool = False) -> GrowingRow:
        """End a row's session, if it has one, and note who took part in it."""
        session, row.session, row.step = row.session, None, None
        if session is not None:
            row.hops.update(dict.fromkeys(session.hops))
            row.closing = session.start_close(may_audit=may_audit)
            row.closing.add_done_callback(lambda future: self._inbox.put((row, future)))
        return row

    def _end_vain_waits(self, active: set[GrowingRow], left: list[GrowingRow]) -> None:
        """Let a row go on by calls that waits for a session in vain: not where others of ours have one."""
        waiting = {
            row: row.session.seconds_waiting for row in active if row.step is not None and row.session is not None
        }
        if any(row.holds_session for row in active) or not any(waiting.values()):
            self._waits_for = ""
            return
        self._waits_for = self._blocks.status().waiting or self._waits_for  # none while it is just being asked
        for row, seconds in waiting.items():
            if seconds > self._patience and row.step is not None:
                row.step.cancel()
                left.append(self._detached(row))
                why = self._waits_for or "no server opened one"
                self._rest_from_sessions(f"none within {self._patience:g} s: {why}")

    def _rest_from_sessions(self, why: str) -> None:
        self._no_session_until = time.monotonic() + GenerationPolicy.rest
        self._why = "no session", why

    def _abandon(self, active: Iterable[GrowingRow]) -> None:
        """End what is under way, and wait until the servers have let go of it."""
        closing = []
        with suppress(SwarmError):  # the connection is closed or lost, and with it every session
            for row in active:
                if row.step is not None:
                    row.step.cancel()
                self._detached(row)
                closing += [] if row.closing is None else [row.closing]
        for future in closing:
            with suppress(SwarmError):
                future.result()

    # -- by a forward call a token

    def by_calls(self, rows: list[GrowingRow], source: _Source) -> Generator[GrowingRow]:
        """Yield these rows as they are over, and of the source's as many as may not be tried in sessions yet."""
        going = list(rows)
        while True:
            while len(going) < self._at_once and time.monotonic() < self._no_session_until:
                row = source.take()
                if row is None:
                    break
                going.append(row)
            if not going:
                return
            self._say_cost(going)
            rows, going = going, []
            with closing(self._steps(rows)) as steps:  # by name, so that nothing is in flight when this is over
                for row, hidden, hops in steps:
                    row.hops.update(dict.fromkeys(hops))
                    before = len(row.text.tokens)
                    if self._went_on(row, hidden):
                        yield row
                    elif len(row.text.tokens) > before:
                        going.append(row)

    def _say_cost(self, rows: Sequence[GrowingRow]) -> None:
        """Say once for each reason what it takes to do without sessions, before it is done."""
        kind, why = self._why
        if kind in self._said:
            return
        self._said.add(kind)
        longest = max(rows, key=lambda row: row.request.positions)
        prompt, steps = self._prefix + len(longest.input_ids), longest.request.positions - len(longest.input_ids) + 1
        whole = steps * prompt + steps * (steps - 1) // 2
        self._on_notice(
            f"note: texts are generated by a forward call a token: the longest of the next {len(rows)} sends up to "
            f"{whole:,} positions through all blocks ({steps:,} calls of {prompt:,} and more); in a session it would "
            f"be {prompt + steps - 1:,}. There is no session: {why}"  # last, for a long line is cut where it is shown
        )

"""Scoring: the examples of a run that its journal does not hold yet, computed, predicted and written down."""

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from petals_eval.data import Rows
from petals_eval.errors import CallerError, ExampleError, SwarmError
from petals_eval.evaluation.wire_error import note_lossless_servers
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import NoisyServer, ServerUsed
from petals_eval.tasks import Task
from petals_eval.tasks.requests import Example, Request

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel
    from petals_eval.swarm import SwarmStatus

__all__ = ["HOPELESS", "Progress", "Scoring"]

_log = logging.getLogger("petals_eval")

HOPELESS = 4096
"""Examples that fail before a run stops because none can be computed: more than are held back to be sorted."""


class Progress(Protocol):
    """Who wants to know how far an evaluation is."""

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None: ...

    def waiting(self, message: str) -> None: ...


@dataclass(slots=True)
class _Open:
    """An example some of whose answers are still on their way."""

    example: Example
    answers: "dict[int, torch.Tensor]" = field(default_factory=dict)
    servers: set[ServerUsed] = field(default_factory=set)


@dataclass(slots=True)
class _Hope:
    """That examples can be computed at all. What fails for every one is a mistake to be told soon, not a list of
    failures.

    is_founded: one was computed. failures: as long as none was.
    """

    is_founded: bool
    failures: int = 0
    first: ExampleError | None = None

    def dwindles(self, error: ExampleError) -> None:
        """Another one failed. Raises the first error, with how many there were, when there is no hope left."""
        self.failures += 1
        self.first = self.first or error
        if not self.is_founded and self.failures >= HOPELESS:
            self._give_up()

    def at_the_end(self, *, any_scored: bool) -> None:
        if self.first is not None and not any_scored:
            self._give_up()

    def _give_up(self) -> None:
        raise type(self.first or ExampleError())(
            f"none of the first {self.failures:,} examples can be computed. The first of them: {self.first}"
        ) from self.first


class Scoring:
    """One evaluation under way."""

    def __init__(
        self,
        model: "RemoteModel",
        task: Task,
        rows: Rows,
        folder: RunFolder,
        progress: Progress | None,
        tokens_per_micro_batch: int | None,
        total: int,
    ):
        self.model = model
        self.task = task
        self.rows = rows
        self.folder = folder
        self.progress = progress
        self.options = {} if tokens_per_micro_batch is None else {"tokens_per_micro_batch": tokens_per_micro_batch}
        self.total = total
        self.done = 0
        self.distrusted: set[str] = set()
        self._said: set[str] = set()
        self._pooling_said: set[str] = set()
        self._withdrawn = False
        self._disputed: set[str] = set()

    def score_all(self, variants: "Sequence[tuple[str, Adapter | None]]") -> None:
        """Score the variants in turn, and once more what servers had computed that were caught later."""
        from petals_eval.swarm.trust.unequal import dropout_text

        dropout = self.model.config_dropout
        if dropout:
            self.say(
                f"note: this model's config has {dropout_text(dropout)}, and Petals servers leave dropout on: each is "
                "asked one question twice before it is used"
            )
        try:
            while True:
                self.done, self._withdrawn = 0, False
                for name, adapter in variants:
                    self.score(name, adapter)
                self.model.blocks.settle(on_tick=self.tick)
                if not self._withdrawn:
                    return
        except (SwarmError, CallerError, KeyboardInterrupt):
            self.tick()  # what a server scored that was caught in the last moment must not stay
            raise

    def score(self, name: str, adapter: "Adapter | None") -> None:
        """Score every example that the journal does not hold yet, as answers come back."""
        journal = self.folder.journal
        done_before = journal.done_keys(name)
        self.done += len(done_before)
        prefix = 0 if adapter is None else adapter.prefix_length
        open_examples: dict[str, _Open] = {}
        hope = _Hope(bool(done_before))

        def requests() -> Iterator[Request]:
            for example in self.task.examples(self.rows, self.model.local.tokenizer):
                if example.key in done_before:
                    continue
                try:
                    for request in example.requests:
                        self.model.local.check_length(len(request.input_ids), prefix)
                except ExampleError as error:
                    self._note_failure(name, example, error)
                    if not open_examples:
                        hope.dwindles(error)
                    continue
                open_examples[example.key] = _Open(example)
                if self.task.head == "class":
                    self._say_pooling(example, adapter)
                yield from example.requests

        def failed(request: Request, error: ExampleError) -> None:
            waiting = open_examples.pop(request.key, None)
            if waiting is not None:  # otherwise another request of the same example has failed
                self._note_failure(name, waiting.example, error, waiting.servers)
                hope.dwindles(error)

        answers_as_they_come = self.model.compute(
            requests(), adapter, on_tick=self.tick, on_failed=failed, **self.options
        )
        # Closed by name: while somebody keeps an exception from in here, what is in flight would go on. The session
        # ends before: it commits what waits.
        with contextlib.closing(answers_as_they_come), journal.session(name):
            for answered in answers_as_they_come:
                waiting = open_examples.get(answered.request.key)
                if waiting is None:
                    continue  # another request of this example has failed
                waiting.answers[answered.request.part] = answered.answer
                waiting.servers.update(
                    ServerUsed(hop.peer_id, hop.first, hop.last, hop.version, hop.dtype, hop.quant)
                    for hop in answered.hops
                )
                if len(waiting.answers) < len(waiting.example.requests):
                    continue
                del open_examples[answered.request.key]
                if not self.distrusted.isdisjoint(server.peer_id for server in waiting.servers):
                    self._withdrawn = True  # on its way when its server was caught: computed again like the rest
                    continue
                example = waiting.example
                answers = [waiting.answers[part] for part in range(len(example.requests))]
                try:
                    prediction = self.task.predict(example, answers)
                except ExampleError as error:
                    self._note_failure(name, example, error, waiting.servers)
                    hope.dwindles(error)
                    continue
                journal.add(name, prediction, truncated=example.truncated, servers=tuple(waiting.servers))
                self.done += 1
                hope.is_founded = True
        self.tick()
        hope.at_the_end(any_scored=journal.counts(name).scored > 0)

    def _note_failure(
        self, name: str, example: Example, error: ExampleError, servers: Collection[ServerUsed] = ()
    ) -> None:
        self.folder.journal.add_failure(
            name,
            example.key,
            example.label,
            str(error),
            n_tokens=example.n_tokens,
            truncated=example.truncated,
            servers=tuple(servers),
        )
        self.done += 1

    def _say_pooling(self, example: Example, adapter: "Adapter | None") -> None:
        """Say, once for each adapter, that libraries differ on the token of a text that a head reads."""
        name = "" if adapter is None else adapter.name
        if name in self._pooling_said:
            return
        for request in example.requests:
            note = self.model.local.pooling_note(request.input_ids, adapter)
            if note is not None:
                self._pooling_said.add(name)
                self.say(f"note: {note}")
                return

    def say_what_is_left(self, names: Sequence[str]) -> None:
        """That this goes on with a run, and from where."""
        counts = [self.folder.journal.counts(name) for name in names]
        scored, failed = sum(each.scored for each in counts), sum(each.failed for each in counts)
        tried_again = f", and of these {failed:,} that failed are tried again" if failed else ""
        self.say(
            f"going on with the run in {self.folder.path}: {scored:,} of {self.total:,} examples are scored, "
            f"{self.total - scored:,} are left{tried_again}"
        )

    def scored(self) -> int:
        """Examples in the journal, those of adapters that this pass has not come to among them."""
        journal = self.folder.journal
        return sum(journal.counts(name).scored for name in journal.adapters())

    def tick(self) -> None:
        """Called a few times a second, also while nothing comes back."""
        self.folder.journal.flush_if_due()
        status = self.model.blocks.status()
        self._distrust(status)
        for notice in (*status.notices, *note_lossless_servers(self.model, self.folder)):
            if notice not in self._said:
                self._said.add(notice)
                self.say(notice)
        if self.progress is None:
            return
        if status.waiting is not None:
            self.progress.waiting(f"waiting for the swarm: {status.waiting}")
        else:
            self.progress.update(self.done, status.retries, len(status.servers))

    def say(self, line: str) -> None:
        """A line for a person, once."""
        if self.progress is None:
            _log.warning(line)
        else:
            status = self.model.blocks.status()
            self.progress.update(self.done, status.retries, len(status.servers), message=line)

    def _distrust(self, status: "SwarmStatus") -> None:
        """Note the servers whose answers differ, and withdraw what was scored by those that are left out."""
        disputed = {each.server.peer_id for each in status.unequal if each.verdict == "disputed"}
        cleared, self._disputed = self._disputed - disputed, disputed
        if not status.unequal:
            return
        caught = {each.server.peer_id for each in status.unequal if not each.is_used}
        if caught - self.distrusted:
            withdrawn = self.folder.journal.withdraw(caught - self.distrusted)
            self.done = max(0, self.done - withdrawn)
            self._withdrawn = self._withdrawn or withdrawn > 0
        self.distrusted = caught
        self.folder.note_noisy(
            (
                NoisyServer(
                    each.server.peer_id,
                    each.server.start,
                    each.server.end,
                    each.server.record.version,
                    each.difference,
                    each.is_used,
                    each.verdict,
                )
                for each in status.unequal
            ),
            cleared=cleared,
        )

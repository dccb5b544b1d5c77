"""Scoring: the examples of a run that its journal does not hold yet, computed, predicted and written down."""

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from petals_eval.errors import CallerError, ExampleError, SwarmError
from petals_eval.evaluation.prepare import Prepared, Variant
from petals_eval.evaluation.wire_error import note_lossless_servers
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import NoisyServer, ServerUsed, Verdict
from petals_eval.tasks import Task
from petals_eval.tasks.clusters import clustered_examples, with_cluster
from petals_eval.tasks.requests import Example, Generated, Request

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel, RequestAnswer
    from petals_eval.swarm import ServedHop, SwarmStatus
    from petals_eval.swarm.peers.finding import TrustFinding

__all__ = [
    "MAX_FAILURES_BEFORE_FIRST_SUCCESS",
    "FailFast",
    "PendingExamples",
    "Progress",
    "Scoring",
    "noisy_server",
    "server_used",
]

_log = logging.getLogger("petals_eval")

_VERDICTS: Mapping[str, Verdict] = {"nondeterministic": "noisy", "wrong": "liar", "disputed": "disputed"}
"""The words that files of schema 1 have for `TrustFinding.status`."""

MAX_FAILURES_BEFORE_FIRST_SUCCESS = 4096
"""More than are held back to be sorted by length (`petals_eval.data.micro_batches`)."""


class Progress(Protocol):
    """Who wants to know how far an evaluation is."""

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None: ...

    def waiting(self, message: str) -> None: ...


@dataclass(slots=True)
class FailFast:
    """Stops a run whose first examples all fail: that is a mistake to be told soon, not a list of failures.

    any_scored: whether an example was ever scored.
    """

    any_scored: bool
    failures: int = 0
    first: ExampleError | None = None

    def record_failure(self, error: ExampleError) -> None:
        """Count a failure. Raises the first one, with how many there were, when that is too many without a success."""
        self.failures += 1
        self.first = self.first or error
        if not self.any_scored and self.failures >= MAX_FAILURES_BEFORE_FIRST_SUCCESS:
            self._stop()

    def end(self, *, any_scored: bool) -> None:
        """Raise the first failure where nothing was scored to the end."""
        if self.first is not None and not any_scored:
            self._stop()

    def _stop(self) -> None:
        raise type(self.first or ExampleError())(
            f"none of the first {self.failures:,} examples can be computed. The first of them: {self.first}"
        ) from self.first


def server_used(hop: "ServedHop") -> ServerUsed:
    """Return who computed a hop, as a manifest has it."""
    return ServerUsed(hop.peer_id, hop.span.start, hop.span.stop, hop.version, hop.dtype, hop.quant)


def noisy_server(finding: "TrustFinding") -> NoisyServer:
    """Return what was found of a server, as a manifest has it."""
    server = finding.server
    return NoisyServer(
        server.peer_id,
        server.span.start,
        server.span.stop,
        server.record.version,
        finding.difference,
        finding.is_used,
        _VERDICTS[finding.status],
    )


@dataclass(slots=True)
class Pending:
    """An example some of whose answers are still out.

    answers: by the part of their request. servers: who computed them.
    """

    example: Example
    answers: "dict[int, torch.Tensor | Generated]" = field(default_factory=dict)
    servers: set[ServerUsed] = field(default_factory=set)


class PendingExamples:
    """The examples of a variant whose answers are still out.

    check: raises ExampleError for a request that the model cannot be asked, such as one that is longer than it reads.
    on_failed: told of each example that cannot be computed, and of who computed a part of it.
    fail_fast: stops the run; not by examples too long for the model while others are out, which may yet be scored.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        *,
        check: Callable[[Request], object],
        on_failed: Callable[[Example, ExampleError, Collection[ServerUsed]], object],
        fail_fast: FailFast,
    ):
        self._examples = examples
        self._check = check
        self._on_failed = on_failed
        self._fail_fast = fail_fast
        self._pending: dict[str, Pending] = {}

    def requests(self) -> Iterator[Request]:
        """Yield what the examples ask of the model, as it is taken."""
        for example in self._examples:
            try:
                if example.error is not None:
                    raise example.error
                for request in example.requests:
                    self._check(request)
            except ExampleError as error:
                self._on_failed(example, error, ())
                if not self._pending:
                    self._fail_fast.record_failure(error)
                continue
            self._pending[example.key] = Pending(example)
            yield from example.requests

    def fail(self, request: Request, error: ExampleError) -> None:
        """Let the example fail that a request belongs to, unless another request of it has failed before."""
        pending = self._pending.pop(request.key, None)
        if pending is not None:
            self._on_failed(pending.example, error, pending.servers)
            self._fail_fast.record_failure(error)

    def add(self, answer: "RequestAnswer") -> Pending | None:
        """Take an answer; returns its example if it was the last one, with all of them."""
        pending = self._pending.get(answer.request.key)
        if pending is None:
            return None  # another request of this example has failed
        pending.answers[answer.request.part] = answer.answer
        pending.servers.update(map(server_used, answer.hops))
        if len(pending.answers) < len(pending.example.requests):
            return None
        return self._pending.pop(answer.request.key)


class Scoring:
    """One evaluation under way.

    withdrawn: whether rows were taken back since `score_all` began or ended, for a server was caught that had a part in
    them.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, model: "RemoteModel", progress: Progress | None):
        self.prepared = prepared
        self.folder = folder
        self.model = model
        self.progress = progress
        self.done = 0
        self._distrusted: set[str] = set()
        self._disputed: set[str] = set()
        self.withdrawn = False
        self._said: set[str] = set()
        self._pooling_said: set[str] = set()

    @property
    def total(self) -> int:
        """How many examples there are, over all variants."""
        return self.prepared.total

    def score_all(self) -> None:
        """Score the variants in turn, and once more what servers had computed that were caught later."""
        from petals_eval.swarm.trust.finding_text import dropout_text

        dropout = self.model.config_dropout
        if dropout:
            self.say(
                f"note: this model's config has {dropout_text(dropout)}, and Petals servers leave dropout on: each is "
                "asked one question twice before it is used"
            )
        try:
            while True:
                self.done, self.withdrawn = 0, False
                for variant in self.prepared.variants:
                    self.score(variant)
                self.model.blocks.settle(on_tick=self.tick)
                if not self.withdrawn:
                    return
        except (SwarmError, CallerError, KeyboardInterrupt):
            self.tick()  # what a server scored that was caught in the last moment must not stay
            raise

    def score(self, variant: Variant) -> None:
        """Score every example that the journal does not hold yet, as answers come back."""
        name, adapter, task = variant
        journal, local = self.folder.journal, self.model.local
        done_before = journal.done_keys(name)
        self.done += len(done_before)
        prefix = 0 if adapter is None else adapter.prefix_length
        fail_fast = FailFast(any_scored=bool(done_before))
        pending = PendingExamples(
            self._left(done_before, adapter, task),
            check=lambda request: local.check_request(request, prefix),
            on_failed=partial(self._record_failure, name),
            fail_fast=fail_fast,
        )
        answers = self._answers(pending, adapter, task)
        # Closed by name: while somebody keeps an exception from in here, what is in flight would go on. The session
        # ends before: it commits what waits.
        with contextlib.closing(answers), journal.session(name):
            for answer in answers:
                complete = pending.add(answer)
                if complete is None:
                    continue
                example, servers = complete.example, tuple(complete.servers)
                if not self._distrusted.isdisjoint(server.peer_id for server in servers):
                    self.withdrawn = True  # on its way when its server was caught: computed again like the rest
                    continue
                try:
                    prediction = task.predict(
                        example, [complete.answers[part] for part in range(len(example.requests))]
                    )
                except ExampleError as error:
                    self._record_failure(name, example, error, servers)
                    fail_fast.record_failure(error)
                    continue
                prediction = with_cluster(prediction, example)
                self.folder.save_text(name, prediction)
                journal.add(name, prediction, kind=task.kind, truncated=example.truncated, servers=servers)
                self.done += 1
                fail_fast.any_scored = True
        self.tick()
        fail_fast.end(any_scored=journal.counts(name).scored > 0)

    def _answers(self, pending: PendingExamples, adapter: "Adapter | None", task: Task) -> "Generator[RequestAnswer]":
        at_once = self.prepared.tokens_per_micro_batch
        if task.kind != "generation":
            return self.model.compute(
                pending.requests(),
                adapter,
                tokens_per_micro_batch=at_once,
                on_tick=self.tick,
                on_failed=pending.fail,
            )
        return self.model.generate(
            pending.requests(),
            adapter,
            tokens_per_micro_batch=at_once,
            on_tick=self.tick,
            on_failed=pending.fail,
            on_notice=self._say_once,
        )

    def _left(self, done_before: Collection[str], adapter: "Adapter | None", task: Task) -> Iterator[Example]:
        """Yield the examples that are left, and say once for an adapter that libraries pool their texts otherwise."""
        name = "" if adapter is None else adapter.name
        for example in clustered_examples(task, self.prepared.part, self.model.local.tokenizer):
            if example.key in done_before:
                continue
            if task.head == "class" and name not in self._pooling_said:
                notes = (self.model.local.pooling_note(each.input_ids, adapter) for each in example.requests)
                if (note := next(filter(None, notes), None)) is not None:
                    self._pooling_said.add(name)
                    self.say(f"note: {note}")
            yield example

    def _record_failure(
        self, name: str, example: Example, error: ExampleError, servers: Collection[ServerUsed]
    ) -> None:
        self.folder.journal.add_failure(
            name,
            example.key,
            example.label,
            str(error),
            kind=self.prepared.task.kind,
            row_hash=example.row_hash,
            n_requests=len(example.requests),
            n_tokens=example.n_tokens,
            truncated=example.truncated,
            servers=tuple(servers),
        )
        self.done += 1

    def say_what_is_left(self) -> None:
        """Say that this goes on with a run, and from where."""
        counts = [self.folder.journal.counts(name) for name, *_ in self.prepared.variants]
        scored, failed = sum(each.scored for each in counts), sum(each.failed for each in counts)
        tried_again = f", and of these {failed:,} that failed are tried again" if failed else ""
        self.say(
            f"going on with the run in {self.folder.path}: {scored:,} of {self.total:,} examples are scored, "
            f"{self.total - scored:,} are left{tried_again}"
        )

    def scored(self) -> int:
        """Count the examples in the journal, those of adapters that this pass has not come to among them."""
        journal = self.folder.journal
        return sum(journal.counts(name).scored for name in journal.adapters())

    def tick(self) -> None:
        """Look after the run, a few times a second and also while nothing comes back."""
        self.folder.journal.flush_if_due()
        status = self.model.blocks.status()
        self._note_findings(status)
        for notice in (*status.notices, *note_lossless_servers(self.model, self.folder)):
            self._say_once(notice)
        if self.progress is None:
            return
        if status.waiting is not None:
            self.progress.waiting(f"waiting for the swarm: {status.waiting}")
        else:
            self.progress.update(self.done, status.retries, len(status.servers))

    def _say_once(self, notice: str) -> None:
        if notice not in self._said:
            self._said.add(notice)
            self.say(notice)

    def say(self, line: str) -> None:
        """Show a person a line."""
        if self.progress is None:
            _log.warning(line)
        else:
            status = self.model.blocks.status()
            self.progress.update(self.done, status.retries, len(status.servers), message=line)

    def _note_findings(self, status: "SwarmStatus") -> None:
        """Note the servers whose answers differ, and withdraw what was scored by those that are left out."""
        disputed = {each.server.peer_id for each in status.findings if each.status == "disputed"}
        cleared, self._disputed = self._disputed - disputed, disputed
        if not status.findings:
            return
        caught = {each.server.peer_id for each in status.findings if not each.is_used}
        if caught - self._distrusted:
            withdrawn = self.folder.journal.withdraw(caught - self._distrusted)
            self.done = max(0, self.done - withdrawn)
            self.withdrawn = self.withdrawn or withdrawn > 0
        self._distrusted = caught
        self.folder.note_noisy(
            map(noisy_server, status.findings),
            cleared=cleared,
        )

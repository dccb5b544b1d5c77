"""Numerical noise: some rows of a run computed again otherwise, to see how far their numbers move."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from petals_eval.data import sample
from petals_eval.errors import ExampleError, PetalsEvalError, SwarmError
from petals_eval.evaluation.prepare import Prepared, Variant
from petals_eval.evaluation.wire_error import SAMPLE, Answers, answers_to, lossless
from petals_eval.metrics.noise import MARGIN, changes, margins, numbers_of
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import NoiseRecord, Recomputed, RecomputeWay
from petals_eval.runs.rows import packed
from petals_eval.tasks import Task
from petals_eval.tasks.clusters import without_cluster
from petals_eval.tasks.requests import Example, Prediction

if TYPE_CHECKING:
    from petals_eval.remote_model import RemoteModel

__all__ = ["Attempt", "NoisePolicy", "another_size", "attempts", "limited", "not_tried", "note_noise", "rows_each_way"]


@dataclass(frozen=True)
class NoisePolicy:
    """How much is computed again.

    rows: in each way at most. share: of a run's rows that all ways together may take.
    few_rows, few_share: a small run may take so many rows in each way, as long as that is no larger share in all ways.
    fewest: with fewer rows a mean change says too little, and none are computed.
    seconds, seconds_share: how long all of it may take, beside this share of what the run took.
    """

    rows: int = 64
    share: float = 0.01
    few_rows: int = 32
    few_share: float = 0.05
    fewest: int = 4
    seconds: float = 5.0
    seconds_share: float = 0.05


_NO_TEXTS = "texts are not generated again: that would take hundreds of steps of the servers"
_NO_REPLICA = "no other server holds the blocks of those that computed"


def rows_each_way(scored: int, ways: int, *, computed_before: int = 0) -> int:
    """Return how many rows to compute again in each of so many ways; 0 where too few would be.

    scored: rows of the run. computed_before: rows that were computed beside them already, for a lossy wire.

    >>> rows_each_way(20_000, 3), rows_each_way(20_000, 3, computed_before=32), rows_each_way(400, 1)
    (64, 56, 20)
    >>> rows_each_way(100, 1), rows_each_way(100, 2)
    (5, 0)
    """
    policy = NoisePolicy()
    allowed = int(policy.share * scored) - computed_before
    allowed_few = min(ways * policy.few_rows, int(policy.few_share * scored))
    rows = min(policy.rows, max(allowed, allowed_few) // ways)
    return rows if rows >= policy.fewest else 0


def note_noise(prepared: Prepared, folder: RunFolder, model: "RemoteModel", *, on_tick: Callable[[], object]) -> None:
    """Compute some rows of each adapter again, and note in the run folder how far their numbers moved.

    What fails is noted as not measured, and why: but for an interrupt it never fails the run. Raises MachineError where
    the folder cannot be written.
    """
    names = [name for name, *_ in prepared.variants]
    tick = limited(sum(folder.journal.seconds(name) for name in names), on_tick)
    used = list(dict.fromkeys(server.peer_id for server, _ in folder.journal.servers()))
    with contextlib.ExitStack() as stack:
        ways = attempts(used, model, stack)
        folder.note_noise([_measured(prepared, folder, model, variant, ways, tick) for variant in prepared.variants])
    with contextlib.suppress(SwarmError):
        model.blocks.settle(on_tick=on_tick)


def limited(took: float, on_tick: Callable[[], object]) -> Callable[[], object]:
    """Return `on_tick` for what is computed again after so many seconds of a run, from now on.

    It raises SwarmError once that takes too long.
    """
    policy = NoisePolicy()
    limit = policy.seconds + policy.seconds_share * took
    until = time.monotonic() + limit

    def tick() -> None:
        on_tick()
        if time.monotonic() > until:
            raise SwarmError(f"it took longer than {limit:.0f} s")

    return tick


@dataclass(frozen=True, eq=False)
class Attempt:
    """A way to compute rows again. open: gives the model to compute them with. avoided: servers that must not."""

    way: RecomputeWay
    open: "Callable[[], contextlib.AbstractContextManager[RemoteModel]]"
    avoided: tuple[str, ...] = ()

    def failed(self, error: PetalsEvalError) -> str:
        """Return what is noted where it could not be tried to the end."""
        return f"{_TITLES[self.way]} not measured: {error}"


def attempts(used: Sequence[str], model: "RemoteModel", stack: contextlib.ExitStack) -> list[Attempt]:
    """Return the ways that there are to compute again what these servers (peer ids) computed.

    A connection that one of them needs is opened once and ends with the stack.
    """
    ways = [Attempt("batching", lambda: contextlib.nullcontext(model))]
    if avoided := model.blocks.replaceable(used):

        @contextlib.contextmanager
        def elsewhere() -> "Iterator[RemoteModel]":
            with model.blocks.avoiding(avoided):
                yield model

        ways.append(Attempt("replica", elsewhere, avoided))
    if model.blocks.settings.wire is not None:
        connected: list[RemoteModel] = []

        @contextlib.contextmanager
        def exact() -> "Iterator[RemoteModel]":
            if not connected:
                connected.append(stack.enter_context(lossless(model)))
            yield connected[0]

        ways.append(Attempt("lossless", exact))
    return ways


def _measured(
    prepared: Prepared,
    folder: RunFolder,
    model: "RemoteModel",
    variant: Variant,
    ways: Sequence[Attempt],
    on_tick: Callable[[], object],
) -> NoiseRecord:
    name, _, task = variant
    if task.kind == "generation":
        return NoiseRecord(name, notes=(f"not measured: {_NO_TEXTS}",))
    scored = folder.journal.counts(name).scored
    has_wire_sample = any(attempt.way == "lossless" for attempt in ways) and variant is prepared.variants[0]
    count = rows_each_way(scored, len(ways), computed_before=2 * SAMPLE if has_wire_sample else 0)
    if count == 0:
        return NoiseRecord(name, notes=(f"not measured: of {scored:,} rows too few can be computed again",))
    found: list[Recomputed] = []
    notes = not_tried(ways)
    closest = _closest(folder, name, task)
    for attempt in ways:
        try:
            computed = folder.journal.keys_computed_by(name, attempt.avoided) & closest if attempt.avoided else closest
            examples, predictions = _drawn(prepared, folder, model, variant, count, computed)
            prefix = 0 if variant.adapter is None else variant.adapter.prefix_length
            requests = (request for example in examples for request in example.requests)
            size = another_size(model, prefix + max(len(request.input_ids) for request in requests))
            with attempt.open() as other:
                again = answers_to(other, examples, variant.adapter, on_tick, size)
            found += _moved(task, examples, predictions, again, attempt.way)
        except PetalsEvalError as error:
            notes.append(attempt.failed(error))
    return NoiseRecord(name, tuple(found), tuple(notes))


_TITLES = {"batching": "in another batching", "replica": "on other servers", "lossless": "without the lossy wire"}


def not_tried(ways: Sequence[Attempt]) -> list[str]:
    """Return what is noted of ways that there are not."""
    return [] if any(attempt.way == "replica" for attempt in ways) else [f"on other servers not tried: {_NO_REPLICA}"]


def _closest(folder: RunFolder, name: str, task: Task) -> set[str]:
    """Return the keys of the scored rows whose margin is no larger than the median; all where there are no margins.

    Those that rounding may turn are among them, and where scores are large they move more than these do.
    """
    scored = folder.journal.keyed_rows(name, folder.manifest.answer_columns)
    if MARGIN not in numbers_of(task.kind, task.metrics):
        return set(scored.keys)
    ahead = margins(scored.rows.values[:, 0], scored.rows.starts)
    return {key for key, is_close in zip(scored.keys, ahead <= np.median(ahead), strict=True) if is_close}


def _drawn(
    prepared: Prepared, folder: RunFolder, model: "RemoteModel", variant: Variant, count: int, wanted: Set[str]
) -> tuple[list[Example], dict[str, Prediction]]:
    """Return so many of the wanted rows, by their keys, as the run's seed draws, with what was predicted of each.

    The rows are read again, for nobody kept them. Raises ExampleError where there are too few, and as the task does.
    """
    name, _, task = variant
    journal = folder.journal
    drawn = 2 * count
    while True:
        rows = sample(prepared.part, drawn, prepared.seed)
        examples = [each for each in task.examples(rows, model.local.tokenizer) if each.key in wanted]
        if len(examples) >= count or drawn >= len(prepared.part):
            break
        drawn *= 2
    examples = examples[:: max(1, len(examples) // count)][:count]  # spread: they are in the order of the source
    if len(examples) < NoisePolicy.fewest:
        raise ExampleError(f"only {len(examples)} rows can be compared")
    columns = len(folder.manifest.answer_columns)
    found = journal.predictions_of(name, [each.key for each in examples], columns)
    return examples, {key: without_cluster(each, task) for key, each in found.items()}


def another_size(model: "RemoteModel", longest: int) -> int:
    """Return how many positions to send together so that rows are in other company than before.

    longest: positions of the longest row, prompts included.

    Half as many as the run sends now; where those would be less than two rows of the longest, which may have gone
    alone, so many that some go together.
    """
    at_once = model.positions_at_once()
    return at_once // 2 if at_once >= 4 * longest else max(2 * at_once, 2 * longest)


def _moved(
    task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction], again: Answers, way: RecomputeWay
) -> list[Recomputed]:
    """Return how far each number of these rows moved."""
    before = [predictions[each.key] for each in examples]
    after = [task.predict(each, again[each.key]) for each in examples]
    then, now = _as_rows(before, task.columns), _as_rows(after, task.columns)
    chosen = [(old.prediction, new.prediction) for old, new in zip(before, after, strict=True)]
    changed = None if any(old is None for old, _ in chosen) else sum(old != new for old, new in chosen)
    found = []
    for number, of_rows in numbers_of(task.kind, task.metrics).items():
        moved = changes(number, of_rows(then), of_rows(now), then.starts)
        if len(moved):
            found.append(Recomputed(way, number, len(moved), float(moved.mean()), float(moved.max()), changed))
    return found


def _as_rows(predictions: Sequence[Prediction], columns: Sequence[str]) -> ScoredRows:
    return ScoredRows.of(((each.label, each.prediction, packed(each.values)) for each in predictions), columns)

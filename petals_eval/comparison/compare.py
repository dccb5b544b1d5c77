"""The comparison itself: sides found, their rows matched, every pair held against each other."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from petals_eval.comparison.sources import Compared, of_folder, of_predictions, of_result
from petals_eval.comparison.tables import as_csv, as_latex, as_lines, as_markdown
from petals_eval.errors import ConfigError, DataError
from petals_eval.metrics import KINDS, check_metric_names
from petals_eval.metrics.differences import Difference, Side, differences, pairs_of
from petals_eval.runs import RunResult
from petals_eval.runs.matching import MatchedRows, match_rows
from petals_eval.runs.results import WITHOUT_POSITIONS
from petals_eval.tasks import Task, load_task
from petals_eval.text import listed, plural

__all__ = ["ChangedRow", "Comparison", "compare"]

SCHEMA_VERSION = 1

Change = Literal["now wrong", "now right", "wrong otherwise"]


@dataclass(frozen=True, slots=True)
class ChangedRow:
    """A row that two sides predict otherwise. label, first, second: names where there are any, else positions.

    change: from the first side to the second, "now wrong", "now right" or "wrong otherwise"; None without a label.
    """

    key: str
    label: str | int | None
    first: str | int
    second: str | int
    change: Change | None

    def to_json(self) -> dict[str, object]:
        return {
            "key": self.key,
            "label": self.label,
            "first": self.first,
            "second": self.second,
            "change": self.change,
        }


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare` returns.

    sides: by name, the folder or file of each. rows: that all of them have scored. left_out: by name, how many more a
    side has. differences: of every pair in every metric. changed: by pair, how many predictions differ; None for kinds
    whose predictions are no labels.
    """

    sides: Mapping[str, str]
    rows: int
    left_out: Mapping[str, int]
    differences: tuple[Difference, ...]
    changed: Mapping[tuple[str, str], int | None]
    matched: MatchedRows
    label_names: tuple[str, ...]

    @property
    def clusters(self) -> NDArray[np.int64] | None:
        """Which cluster each row is of, int64 (n,) from 0; None where the task names none."""
        return self.matched.clusters

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The names of the sides of each pair, in order."""
        return tuple(self.changed)

    def of(self, first: str, second: str) -> dict[str, Difference]:
        """Return the differences of a pair, by metric."""
        return {each.metric: each for each in self.differences if (each.first, each.second) == (first, second)}

    def changed_rows(self, first: str, second: str) -> Iterator[ChangedRow]:
        """Yield the rows whose prediction is another one on the second side, in the order of the data."""
        if self.changed[first, second] is None:
            return
        one, other = (self.matched.sides[name][0] for name in (first, second))
        for row in np.flatnonzero(one.predictions != other.predictions).tolist():
            label, before, after = one.labels[row], one.predictions[row], other.predictions[row]
            change: Change | None = "wrong otherwise"
            if label != label:
                change = None
            elif before == label:
                change = "now wrong"
            elif after == label:
                change = "now right"
            named = [self._named(each) for each in (before, after)]
            yield ChangedRow(
                self.matched.keys[row], None if change is None else self._named(label), named[0], named[1], change
            )

    def to_json(self, *, changed_rows: int = 0, texts: Mapping[str, str] | None = None) -> dict[str, object]:
        """Return what `petals-eval compare --json` prints.

        changed_rows: shown of each pair, at most. texts: of these rows, by key; None: keys alone.
        """

        def row(each: ChangedRow) -> dict[str, object]:
            return each.to_json() | ({} if texts is None else {"text": texts.get(each.key)})

        return {
            "schema_version": SCHEMA_VERSION,
            "sides": [{"name": name, "source": source} for name, source in self.sides.items()],
            "rows": self.rows,
            "left_out": dict(self.left_out),
            "clusters": None if self.clusters is None else int(self.clusters.max()) + 1,
            "differences": [
                {**each.to_json(), "changed": self.changed[each.first, each.second]} for each in self.differences
            ],
            "changed_rows": [
                {"first": first, "second": second, "rows": rows}
                for first, second in self.pairs
                if (rows := [row(each) for each in islice(self.changed_rows(first, second), changed_rows)])
            ],
        }

    def to_csv(self) -> str:
        """Return the table of the differences as csv."""
        return as_csv(self.differences)

    def to_markdown(self) -> str:
        """Return the table of the differences in Markdown."""
        return as_markdown(self.differences)

    def _repr_markdown_(self) -> str:
        """Return what a notebook shows of a comparison that is the last line of a cell."""
        return self.to_markdown()

    def to_latex(self) -> str:
        """Return the table of the differences as a LaTeX tabular (booktabs)."""
        return as_latex(self.differences)

    def __repr__(self) -> str:
        """Return how many rows were compared, and a line for each metric of each pair."""
        return "\n".join([f"{plural(self.rows, 'row')} compared", *as_lines(self.differences)])

    def _named(self, position: float) -> str | int:
        return self.label_names[int(position)] if self.label_names else int(position)


def compare(
    *runs: str | Path | RunResult,
    metrics: Sequence[str] = (),
    against: str | None = None,
    task: str | Path | Mapping[str, Any] | Task | None = None,
    data: str | Path | None = None,
    seed: int | None = None,
) -> Comparison:
    """Compare runs, or the adapters of one, on the same rows.

    runs: run folders, results that hold their predictions, and files of predictions of other tools (columns `key`,
        `prediction` and `label`; csv, tsv, JSONL or Parquet). Of a folder with several adapters each one is a side; of
        a single folder what was evaluated without prompts, too.
        "NAME=PATH" gives a run the name under which it is a side, or NAME/adapter of several.
    metrics: to be compared; by default all that the sides have in common and that have intervals.
    against: the name of a side, or its folder or file: it is compared with each other one; otherwise all pairs are.
    task, data: say what is right and what predictions mean, for files without a run beside them.
    seed: of the bootstrap; None: that of the first side.

    Rows are matched by key. Raises DataError where rows of one key differ in label or content, or no row is in all
    sides; ConfigError for sides of other labels or without a common metric, RunFolderError, MachineError.
    """
    sides = _named_apart(_sides(runs, task, data))
    if len(sides) < 2:
        raise ConfigError(
            "expected two or more to compare: run folders, a folder with several adapters, or files of predictions; "
            f"found {f'one: {runs[0]}' if sides else 'none'}."
        )
    if against is not None:
        against = _of_source(sides, against)
    found = list(sides.values())
    label_names = _common_label_names(sides)
    chosen = _common_metrics(found, metrics)
    fingerprints = {each.fingerprint for each in found}
    matched = match_rows(
        {name: side.draws for name, side in sides.items()},
        same_data=len(fingerprints) == 1 and None not in fingerprints,
    )
    pairs = pairs_of(list(sides), against=against)
    compared = differences(
        [Side(name, sides[name].kind, rows) for name, rows in matched.sides.items()],
        chosen,
        label_names=label_names,
        seed=found[0].seed if seed is None else seed,
        clusters=matched.clusters,
        pairs=pairs,
    )
    return Comparison(
        sides={name: side.source for name, side in sides.items()},
        rows=len(matched),
        left_out=matched.left_out,
        differences=tuple(compared),
        changed={pair: _count_changed(pair, sides, matched) for pair in pairs},
        matched=matched,
        label_names=label_names,
    )


def _of_source(sides: Mapping[str, Compared], asked: str) -> str:
    """Return the side that is asked for by its name, or by the run folder or file as it was given."""
    if asked in sides:
        return asked
    _, place = _split_name(asked)
    found = [name for name, side in sides.items() if side.source == str(place)]
    if len(found) > 1:
        raise ConfigError(f"against: {asked} has several adapters: expected one of {listed(found)}.")
    if not found:
        raise ConfigError(f"against: expected one of {listed(sides)}, or the folder of one; found {asked!r}.")
    return found[0]


def _split_name(run: str | Path) -> tuple[str | None, Path]:
    """Return the name that a run is given by NAME=RUN and its place; None where it is given without one."""
    name, equals, place = str(run).partition("=")
    if isinstance(run, Path) or not equals or Path(run).exists():
        return None, Path(run)
    if not name or not place:
        raise ConfigError(f"expected NAME=RUN, a name and a run folder or file; found {run!r}.")
    return name, Path(place)


def _named(sides: Sequence[Compared], name: str | None) -> list[Compared]:
    """Return the sides of a run under the name that it was given, of several with the adapter's behind it."""
    if name is None:
        return [*sides]
    return [replace(side, name=name if len(sides) == 1 else f"{name}/{side.name}") for side in sides]


def _sides(runs: Sequence[str | Path | RunResult], task: Any, data: str | Path | None) -> list[Compared]:
    known = None if task is None else load_task(task)
    found: dict[int, list[Compared]] = {}
    files: dict[int, tuple[str | None, Path]] = {}
    given: dict[str, Path] = {}
    for number, run in enumerate(runs):
        if isinstance(run, RunResult):
            found[number] = of_result(run, number + 1, bare_too=len(runs) == 1)
        elif not isinstance(run, str | Path):
            raise ConfigError(f"expected run folders, results or files of predictions; found {type(run).__name__}.")
        else:
            name, place = _split_name(run)
            if name is not None and name in given:
                raise ConfigError(
                    f"expected a name of its own for each run; found {name} for {given[name]} and {place}."
                )
            given |= {} if name is None else {name: place}
            if place.is_file():
                files[number] = name, place
            else:
                found[number] = _named(of_folder(place, bare_too=len(runs) == 1), name)
    # What is right is said by a run, wherever it stands among the files.
    beside = next((sides[0] for sides in found.values()), None)
    for number, (name, path) in files.items():
        found[number] = _named([of_predictions(path, beside if known is None else None, known, data)], name)
    return [side for number in sorted(found) for side in found[number]]


def _named_apart(sides: Sequence[Compared]) -> dict[str, Compared]:
    """Return sides by names that differ: where two adapters share one, the folder's stands before it."""
    counts = Counter(side.name for side in sides)
    short = [side.name if counts[side.name] == 1 else f"{Path(side.source).name}/{side.name}" for side in sides]
    found: dict[str, Compared] = {}
    for side, name in zip(sides, short, strict=True):
        unique = name if short.count(name) == 1 else f"{side.source}/{side.name}"
        if unique in found:
            raise ConfigError(f"expected each side once; found {unique} twice.")
        found[unique] = side
    return found


def _common_label_names(sides: Mapping[str, Compared]) -> tuple[str, ...]:
    (first, one), *others = sides.items()
    for name, other in others:
        if other.label_names != one.label_names:
            raise DataError(
                f"{first} and {name} have other labels, or in another order: {listed(one.label_names) or 'none'}, and "
                f"{listed(other.label_names) or 'none'}. Evaluate both with the same label_names."
            )
    return one.label_names


def _common_metrics(sides: Sequence[Compared], asked: Sequence[str]) -> list[str]:
    for side in sides:
        check_metric_names(asked, side.kind, label_names=side.label_names)
    specs = [{spec.name: spec for spec in KINDS[side.kind]} for side in sides]
    names = list(asked) or [name for name in sides[0].metrics if all(name in side.metrics for side in sides)]
    found = [
        name
        for name in names
        if all(each[name].terms or each[name].resampler for each in specs)  # it has an interval
    ]
    needing = [
        name
        for name in asked
        for side, each in zip(sides, specs, strict=True)
        if each[name].needs_scores and name not in side.metrics
    ]
    if needing:
        raise ConfigError(f"metrics: {listed(dict.fromkeys(needing))} need more than another tool's predictions.")
    if not found:
        raise ConfigError(
            "expected a metric with an interval that all sides have; found none: they have "
            f"{'; '.join(listed(side.metrics) for side in sides)}. Name one with --metrics."
        )
    return found


def _count_changed(pair: tuple[str, str], sides: Mapping[str, Compared], matched: MatchedRows) -> int | None:
    one, other = (matched.sides[name] for name in pair)
    kinds = {sides[name].kind for name in pair}
    if len(one) > 1 or len(other) > 1 or kinds & {*WITHOUT_POSITIONS} or np.isnan(one[0].predictions).any():
        return None
    return int((one[0].predictions != other[0].predictions).sum())

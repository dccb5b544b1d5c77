"""The result of a run, computed from its journal alone."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from petals_eval.errors import ConfigError
from petals_eval.metrics import Metric, Spread, confusion_matrix, measure, title_of
from petals_eval.metrics.differences import Difference, Side, differences, pairs_of
from petals_eval.metrics.scored_rows import CLUSTER, ScoredRows
from petals_eval.runs.analyse import analyse, chosen_name
from petals_eval.runs.error_analysis import ErrorAnalysis
from petals_eval.runs.journal import Failure, Journal
from petals_eval.runs.manifest import Manifest, NoiseRecord, NoisyServer, ServerUsed, WireRecord
from petals_eval.runs.matching import match_rows
from petals_eval.runs.noise import NumericalNoise, noise_over_draws, numerical_noise
from petals_eval.runs.row_texts import RowSource
from petals_eval.runs.rows import ComputedRows, KeyedRows
from petals_eval.runs.tables import ResultRow, as_csv, as_latex, as_markdown
from petals_eval.tasks.requests import Prediction
from petals_eval.text import number_text

__all__ = [
    "WITHOUT_POSITIONS",
    "WITHOUT_PROMPTS",
    "AdapterResult",
    "ComputedIn",
    "RunResult",
    "computed_in",
    "over_draws",
    "run_result",
    "summarise",
]

SCHEMA_VERSION = 2
TESTED_PETALS = ("2.2.", "2.3.")  # releases whose wire was tested; on others only the forward path is relied
LABELLED_KINDS = ("classification", "regression", "choice")  # whose rows say what is right in their label
OF_TEXTS_ALONE = ("new_tokens", "stopped_by_length")  # columns of generated texts that need no right text beside them
WITHOUT_POSITIONS = ("regression",)  # kinds whose labels and predictions are numbers, and no positions
WITHOUT_PROMPTS = "without the prompts"  # the journal's adapter name of the run that shows what the prompts are worth


@dataclass(frozen=True, eq=False)
class AdapterResult:
    """What one adapter reached in a run.

    n_examples: scored and failed together; metrics are over the scored ones only.
    n_unlabelled: scored examples of which nobody says what is right; they are in no metric.
    n_clusters: of scored examples that may depend on each other; None where the task names none.
    n_truncated: scored examples whose text was cut. n_tokens: text tokens of the scored examples.
    seconds: what the evaluation itself took, over all sessions of a run that was interrupted.
    label_names, confusion: of labels that all rows share, otherwise empty; counts, row = label, column = prediction.
    draws: with several draws of shots, the result of each, under the journal's name for it; then metrics are the means
        over them, and everything that is counted here is counted over all of them.
    predictions: the scored examples, in the order of the data, where `petals_eval.evaluate` returned this; about 0.8 KB
        each. Those of several draws stand one draw after the other. Empty for the command and for `merge`: the run
        folder has them.
    failures: the examples that could not be computed, with the reason of each; kept as predictions are.
    computed: how the predictions were computed, in their order; kept as they are, of one draw alone.
    noise: what rounding may do to these numbers; None where it was not looked for.
    """

    adapter: str
    n_examples: int
    n_failed: int
    n_truncated: int
    n_tokens: int
    seconds: float
    metrics: Mapping[str, Metric]
    label_names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    n_unlabelled: int = 0
    n_clusters: int | None = None
    draws: "tuple[AdapterResult, ...]" = ()
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)
    failures: tuple[Failure, ...] = field(default=(), repr=False)
    computed: ComputedRows | None = field(default=None, repr=False)
    noise: NumericalNoise | None = None

    @property
    def in_journal(self) -> "tuple[AdapterResult, ...]":
        """The results whose rows the journal has under their names: each draw's, or this one."""
        return self.draws or (self,)

    @property
    def n_scored(self) -> int:
        return self.n_examples - self.n_failed

    @property
    def examples_per_second(self) -> float | None:
        return self.n_scored / self.seconds if self.seconds > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.n_tokens / self.seconds if self.seconds > 0 else None

    def to_json(self) -> dict[str, object]:
        return {
            "adapter": self.adapter,
            "n_examples": self.n_examples,
            "n_scored": self.n_scored,
            "n_failed": self.n_failed,
            **({"n_unlabelled": self.n_unlabelled} if self.n_unlabelled else {}),
            **({} if self.n_clusters is None else {"n_clusters": self.n_clusters}),
            "n_truncated": self.n_truncated,
            "n_tokens": self.n_tokens,
            "seconds": _rounded(self.seconds),
            "examples_per_second": _rounded(self.examples_per_second),
            "tokens_per_second": _rounded(self.tokens_per_second),
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            **(self._of_labels() if self.label_names else {}),
            **({} if self.noise is None else {"noise": self.noise.to_json()}),
            **({"draws": [draw.to_json() for draw in self.draws]} if self.draws else {}),
        }

    def _of_labels(self) -> dict[str, object]:
        return {
            "label_names": list(self.label_names),
            "confusion_matrix": [list(row) for row in self.confusion],
        }


@dataclass(frozen=True, slots=True)
class ComputedIn:
    """What servers of one kind computed with: dtype of their answers, quantisation and version by their own word."""

    dtype: str | None
    quant: str | None
    version: str | None
    servers: int

    @property
    def is_tested(self) -> bool:
        """Whether servers of this version were tested; on any other only the forward path is relied."""
        return self.version is not None and self.version.startswith(TESTED_PETALS)


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `evaluate` returns of a run.

    kind, columns: of the task, and the names of the columns of its predictions' values.
    differences: of the first adapter from each other one, and from the run without prompts, on the rows of both.
    adapters: by name, in the order they were given; at least one.
    without_prompts: the same examples without tuned prompts, where that was asked for.
    retries: micro-batches that were sent again. servers: how many computed something.
    computed_in: in which dtypes, quantisations and versions, the most common first.
    noisy_servers: whose answers were unequal, to one question or to those of others, by how much, and whether they
        were used all the same.
    wire: how far a lossy wire moved answers, and who did not take it; None for a lossless one.
    source: where the rows can be read again, where `petals_eval.evaluate` returned this.
    """

    task: str
    adapters: Mapping[str, AdapterResult]
    without_prompts: AdapterResult | None = None
    retries: int = 0
    servers: int = 0
    computed_in: tuple[ComputedIn, ...] = ()
    noisy_servers: tuple[NoisyServer, ...] = ()
    wire: WireRecord | None = None
    kind: str = "classification"
    columns: tuple[str, ...] = ("score",)
    differences: tuple[Difference, ...] = ()
    source: RowSource | None = field(default=None, repr=False)

    @property
    def first(self) -> AdapterResult:
        """The result of the first adapter."""
        return next(iter(self.adapters.values()))

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the first adapter."""
        return self.first.metrics

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The predictions of the first adapter."""
        return self.first.predictions

    def errors(self, adapter: str | None = None, *, limit: int = 5) -> ErrorAnalysis:
        """Analyse the errors of an adapter, or of the draw of shots of this name; None: of the first one.

        limit: rows in each list. Raises ConfigError for an unknown name and for a result without predictions, and
        DataError where the data are not those of the run any more.
        """
        every = [*self.adapters.values(), *([self.without_prompts] if self.without_prompts else [])]
        named = {each.adapter: each for result in every for each in result.in_journal}
        name, notes = chosen_name(adapter, list(named), {each.adapter: each.in_journal[0].adapter for each in every})
        found = named[name]
        if not found.predictions:
            raise ConfigError(
                "expected a result with its predictions, as petals_eval.evaluate returns it. Give the path of its run "
                "folder to petals_eval.errors_of instead."
            )
        return analyse(
            self.kind,
            KeyedRows.of(found.predictions, self.columns),
            found.computed,
            task=self.task,
            adapter=name,
            label_names=found.label_names,
            failed=found.n_failed,
            limit=limit,
            texts=None if self.source is None else self.source.texts,
            written={each.key: each.text for each in found.predictions},
            notes=notes,
        )

    def rows(self, run: str = "") -> list[ResultRow]:
        """Return a table's row for each adapter, and for the run without prompts. run: what to call this one."""
        every = [*self.adapters.values(), *([self.without_prompts] if self.without_prompts else [])]
        return [
            (
                {
                    "run": run,
                    "task": self.task,
                    "kind": self.kind,
                    "adapter": each.adapter,
                    "rows": each.n_scored,
                    "failed": each.n_failed,
                    **({} if each.noise is None else {"unsure_share": each.noise.share}),
                },
                each.metrics,
            )
            for each in every
        ]

    def to_csv(self) -> str:
        """Return the table of the adapters as csv."""
        return as_csv(self.rows())

    def to_markdown(self) -> str:
        """Return the table of the adapters in Markdown."""
        return as_markdown(self.rows())

    def _repr_markdown_(self) -> str:
        """Return what a notebook shows of a result that is the last line of a cell."""
        return self.to_markdown()

    def to_latex(self) -> str:
        """Return the table of the adapters as a LaTeX tabular (booktabs)."""
        return as_latex(self.rows())

    def to_json(self) -> dict[str, object]:
        """Return `metrics.json`: the first adapter's numbers on top; with several, all again under "adapters"."""
        about = {"schema_version": SCHEMA_VERSION, "task": self.task, "kind": self.kind}
        found: dict[str, object] = {**about, **self.first.to_json()}
        found |= {"retries": self.retries, "servers": self.servers}
        found["computed_in"] = [asdict(each) for each in self.computed_in]
        found["noisy_servers"] = [asdict(each) for each in self.noisy_servers]
        if self.wire is not None:
            found["wire"] = asdict(self.wire)
        if len(self.adapters) > 1:
            found["adapters"] = {name: result.to_json() for name, result in self.adapters.items()}
        if self.without_prompts is not None:
            found["without_prompts"] = self.without_prompts.to_json()
        if self.differences:
            found["differences"] = [each.to_json() for each in self.differences]
        return found

    def __str__(self) -> str:
        """Return a line for each adapter: what a training loop prints."""
        lines = [_line(result) for result in self.adapters.values()]
        if len(lines) > 1:
            lines = [f"{name}: {line}" for name, line in zip(self.adapters, lines, strict=True)]
        return "\n".join(lines)


def computed_in(servers: Sequence[tuple[ServerUsed, int]]) -> tuple[ComputedIn, ...]:
    """Group the servers of a journal (`Journal.servers`) by what they computed with."""
    peers: dict[tuple[str | None, str | None, str | None], set[str]] = {}
    for server, _ in servers:
        peers.setdefault((server.dtype, server.quant, server.version), set()).add(server.peer_id)
    kinds = [ComputedIn(*kind, servers=len(found)) for kind, found in peers.items()]
    return tuple(sorted(kinds, key=lambda kind: (-kind.servers, str(kind))))


def run_result(
    manifest: Manifest,
    journal: Journal,
    *,
    task: str,
    metrics: Sequence[str],
    label_names: Sequence[str],
    retries: int,
    keep_predictions: bool = False,
    with_texts: Callable[[str, Iterable[Prediction]], tuple[Prediction, ...]] = lambda _, found: tuple(found),
) -> RunResult:
    """Compute the result of a run from its journal. Raises as `summarise` does.

    keep_predictions: whether the result holds every prediction. with_texts: gives the predictions under a name of the
        journal what was generated, which no journal has.
    """
    results: dict[str, AdapterResult] = {}
    draws: dict[str, list[AdapterResult]] = {}
    for adapter in manifest.adapters:
        found = summarise(
            journal,
            adapter.name,
            metrics,
            label_names,
            kind=manifest.kind,
            columns=manifest.answer_columns,
            noise=manifest.noise,
        )
        if keep_predictions:
            predictions = with_texts(adapter.name, _predictions(journal, adapter.name, manifest))
            found = replace(
                found,
                predictions=predictions,
                failures=tuple(journal.failures(adapter.name)),
                computed=journal.computed_rows(adapter.name),
            )
        if adapter.adapter is None:
            results[adapter.name] = found
        else:
            draws.setdefault(adapter.adapter, []).append(found)
    results |= {name: over_draws(name, each) for name, each in draws.items()}
    used = journal.servers()
    return RunResult(
        task=task,
        without_prompts=results.pop(WITHOUT_PROMPTS, None),
        adapters=results,
        retries=retries,
        servers=len({server.peer_id for server, _ in used}),
        computed_in=computed_in(used),
        noisy_servers=manifest.noisy_servers,
        wire=manifest.wire,
        kind=manifest.kind,
        columns=manifest.answer_columns,
        differences=tuple(_differences(manifest, journal, metrics, label_names)),
    )


def _differences(
    manifest: Manifest, journal: Journal, metrics: Sequence[str], label_names: Sequence[str]
) -> list[Difference]:
    """Return how much the first adapter differs from each other one, on the rows that all of them scored."""
    sides: dict[str, list[KeyedRows]] = {}
    for adapter in manifest.adapters:
        if len(manifest.adapters) > 1:
            rows = journal.keyed_rows(adapter.name, manifest.answer_columns)
            sides.setdefault(adapter.adapter or adapter.name, []).append(rows)
    # Those of a run that is under way, or failed altogether, have nothing to be compared.
    sides = {name: draws for name, draws in sides.items() if all(map(len, draws))}
    if len(sides) < 2 or not set.intersection(*(set(each.keys) for draws in sides.values() for each in draws)):
        return []
    matched = match_rows(sides, same_data=True)
    first = next(iter(matched.sides))
    return differences(
        [Side(name, manifest.kind, draws) for name, draws in matched.sides.items()],
        metrics,
        label_names=label_names,
        seed=manifest.seeds.get("bootstrap", 0),
        clusters=matched.clusters,
        pairs=pairs_of(list(matched.sides), against=first),
    )


def over_draws(adapter: str, draws: Sequence[AdapterResult]) -> AdapterResult:
    """Return what an adapter reached over several draws of shots: the mean of each metric, and the draws' own results.

    A metric that has no value in one of them has no mean.
    """
    first = draws[0]
    counts = {
        name: sum(getattr(draw, name) for draw in draws)
        for name in ("n_examples", "n_failed", "n_truncated", "n_tokens", "seconds", "n_unlabelled")
    }
    metrics = {}
    for name in first.metrics:
        values = [None if (metric := draw.metrics.get(name)) is None else metric.value for draw in draws]
        known = Spread(tuple(value for value in values if value is not None))
        if len(known.values) == len(draws):
            metrics[name] = Metric(name, known.mean, draws=known)
        else:
            missing = len(draws) - len(known.values)
            metrics[name] = Metric(name, None, note=f"without a value in {missing} of {len(draws)} draws")
    rows = len(first.confusion)
    confusion = tuple(
        tuple(sum(draw.confusion[row][column] for draw in draws) for column in range(rows)) for row in range(rows)
    )
    return AdapterResult(
        adapter=adapter,
        metrics=metrics,
        label_names=first.label_names,
        confusion=confusion,
        n_clusters=first.n_clusters,
        draws=tuple(draws),
        predictions=tuple(itertools.chain.from_iterable(draw.predictions for draw in draws)),
        failures=tuple(itertools.chain.from_iterable(draw.failures for draw in draws)),
        noise=noise_over_draws([draw.noise for draw in draws]),
        **counts,
    )


def summarise(
    journal: Journal,
    adapter: str,
    metrics: Sequence[str],
    label_names: Sequence[str],
    *,
    kind: str = "classification",
    columns: Sequence[str] = ("score",),
    noise: Iterable[NoiseRecord] = (),
) -> AdapterResult:
    """Read one adapter's rows and compute its metrics.

    kind, columns: of the task. noise: what came of computing rows again.
    Raises ConfigError for an unknown metric, DataError where rows do not fit the labels or the columns.
    """
    counts = journal.counts(adapter)
    rows = journal.scored_rows(adapter, columns)
    found = measure(kind, metrics, rows, label_names=label_names)
    confusion: list[list[int]] = []
    if label_names:
        known = rows.labelled()
        confusion = confusion_matrix(known.labels, known.predictions, len(label_names)).tolist()
    return AdapterResult(
        adapter=adapter,
        n_examples=counts.scored + counts.failed,
        n_failed=counts.failed,
        n_truncated=counts.truncated,
        n_tokens=counts.n_tokens,
        seconds=journal.seconds(adapter),
        metrics=found,
        label_names=tuple(label_names),
        confusion=tuple(map(tuple, confusion)),
        n_unlabelled=_unlabelled(kind, rows),
        n_clusters=None if rows.clusters is None else int(rows.clusters.max(initial=-1)) + 1,
        noise=numerical_noise(noise, adapter, kind, rows, metrics, label_names, found),
    )


def _predictions(journal: Journal, adapter: str, manifest: Manifest) -> tuple[Prediction, ...]:
    found = journal.predictions(adapter, len(manifest.answer_columns))
    if manifest.kind in WITHOUT_POSITIONS:
        return tuple(found)
    # SQLite gives back a position as a float.
    return tuple(replace(each, label=_whole(each.label), prediction=_whole(each.prediction)) for each in found)


def _whole(position: float | None) -> int | None:
    return None if position is None else int(position)


def _unlabelled(kind: str, rows: ScoredRows) -> int:
    """Count the rows of which nobody says what is right, in kinds where somebody might."""
    if kind in LABELLED_KINDS:
        return int((~rows.is_labelled).sum())
    compared = [name for name in rows.columns if name not in (*OF_TEXTS_ALONE, CLUSTER)]
    if kind != "generation" or not compared:
        return 0
    return int(np.isnan([rows.column(name) for name in compared]).all(axis=0).sum())


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _line(result: AdapterResult) -> str:
    parts = []
    of_labels = tuple(f"[{label}]" for label in result.label_names)
    for name, metric in result.metrics.items():
        if metric.value is None or name.endswith(of_labels):
            continue
        bounds = [number_text(bound, 3, beside=metric.value) for bound in metric.ci95 or ()]
        interval = f" ({' - '.join(bounds)})" if bounds else ""
        if metric.draws is not None:
            deviation = number_text(metric.draws.standard_deviation, beside=metric.value)
            interval = f" (sd {deviation} over {len(metric.draws.values)} draws)"
        parts.append(f"{title_of(name)} {number_text(metric.value)}{interval}")
    counts = f"n {result.n_scored}" + (f", failed {result.n_failed}" if result.n_failed else "")
    counts += f", without a label {result.n_unlabelled}" if result.n_unlabelled else ""
    return ", ".join([*parts, counts])

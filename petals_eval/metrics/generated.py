"""Metrics of generated texts, from the numbers that the journal has of each row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.intervals import Floats, affordable, percentile_interval, resampled_means, row_weights, wilson
from petals_eval.metrics.probabilistic import fewer_resamples
from petals_eval.metrics.resampling import Draws, Resampler
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec
from petals_eval.metrics.text_libraries import corpus_columns, corpus_value

__all__ = ["GENERATED_METRICS", "GeneratedRows"]


@dataclass(frozen=True, eq=False)
class GeneratedRows:
    """Rows of generated texts, one item each. seed: of the bootstrap."""

    rows: ScoredRows
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str], seed: int) -> "GeneratedRows":
        return cls(rows, seed)

    def named(self, name: str) -> Iterator[tuple[str, Floats, str | None]]:
        """Yield a metric's columns, one, or one for each way of taking an answer out of a text ("name[way]"): their
        name, the values of rows that have one, and what is to be said of the others."""
        for column in self.rows.columns:
            if column == name or column.startswith(f"{name}["):
                values = self.rows.column(column)
                known = values[~np.isnan(values)]
                yield column, known, _note(len(known), len(values))

    def all_counts(self, name: str) -> Floats:
        """Return the counts (n, columns) for BLEU or chrF; NaN in rows that have none."""
        return np.stack([self.rows.column(column) for column in corpus_columns(name)], axis=1)

    def counts(self, name: str) -> tuple[Floats, str | None]:
        """Return the counts (n, columns) of the rows that have some, for BLEU or chrF."""
        counts = self.all_counts(name)
        known = counts[~np.isnan(counts).any(axis=1)]
        return known, _note(len(known), len(counts))


def _note(known: int, total: int) -> str | None:
    if known == total:
        return None
    return (
        f"of {known:,} of {total:,} examples: the others have no right text" if known else "no example has a right text"
    )


def _share(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    def measure(texts: GeneratedRows) -> list[Metric]:
        return [
            Metric(column, float(known.mean()), wilson(int(known.sum()), len(known)), note)
            if len(known)
            else Metric(column, None, None, note)
            for column, known, note in texts.named(name)
        ]

    return measure


def _mean(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    def measure(texts: GeneratedRows) -> list[Metric]:
        found = []
        for column, known, note in texts.named(name):
            if not len(known):
                found.append(Metric(column, None, None, note))
                continue
            means = resampled_means(known[:, None], texts.seed)[:, 0]
            notes = "; ".join(filter(None, (note, fewer_resamples(len(means))))) or None
            found.append(Metric(column, float(known.mean()), percentile_interval(means), notes))
        return found

    return measure


def _corpus(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    def measure(texts: GeneratedRows) -> list[Metric]:
        known, note = texts.counts(name)
        if not len(known):
            return [Metric(name, None, None, note)]
        resamples = affordable(len(known))
        values = [
            corpus_value(name, (weights @ known).tolist()) for weights in row_weights(len(known), resamples, texts.seed)
        ]
        notes = "; ".join(filter(None, (note, fewer_resamples(resamples)))) or None
        return [Metric(name, corpus_value(name, known.sum(axis=0).tolist()), percentile_interval(values), notes)]

    return measure


def _terms(name: str) -> Callable[[GeneratedRows], dict[str, Floats]]:
    return lambda texts: {column: texts.rows.column(column) for column, known, _ in texts.named(name) if len(known)}


def _corpus_on_draws(name: str) -> Callable[[GeneratedRows], Resampler]:
    def resampler(texts: GeneratedRows) -> Resampler:
        counts = np.nan_to_num(texts.all_counts(name))

        def compute(draws: Draws) -> dict[str, Floats]:
            sums = draws.sums(counts)
            return {name: np.array([corpus_value(name, each) if any(each) else np.nan for each in sums.tolist()])}

        return compute

    return resampler


def _spec(
    name: str,
    title: str,
    about: str,
    measure: Callable[[GeneratedRows], list[Metric]],
    *,
    resampler: Callable[[GeneratedRows], Resampler] | None = None,
    higher_is_better: bool = True,
    best: float | None = 1.0,
    is_share: bool = False,
) -> MetricSpec:
    return MetricSpec(
        name,
        title,
        about,
        measure,
        higher_is_better=higher_is_better,
        best=best,
        is_share=is_share,
        view=GeneratedRows.of,
        terms=_terms(name) if resampler is None else None,
        resampler=resampler,
    )


GENERATED_METRICS = (
    _spec("exact_match", "exact match", "share of texts equal to a right one", _share("exact_match"), is_share=True),
    _spec(
        "numbers_equal",
        "numbers equal",
        "share whose last number is a right text's",
        _share("numbers_equal"),
        is_share=True,
    ),
    _spec(
        "token_f1", "token F1", "mean F1 of the words of a text and of a right one, as SQuAD has it", _mean("token_f1")
    ),
    _spec(
        "bleu",
        "BLEU",
        "of all texts together, 0 to 100, by sacrebleu (an extra)",
        _corpus("bleu"),
        best=100.0,
        resampler=_corpus_on_draws("bleu"),
    ),
    _spec(
        "chrf",
        "chrF",
        "of all texts together, 0 to 100, by sacrebleu (an extra)",
        _corpus("chrf"),
        best=100.0,
        resampler=_corpus_on_draws("chrf"),
    ),
    *(
        _spec(
            f"rouge{kind}",
            f"ROUGE-{kind}",
            f"mean F-measure of ROUGE-{kind}, by rouge-score (an extra)",
            _mean(f"rouge{kind}"),
        )
        for kind in ("1", "2", "L")
    ),
    _spec(
        "stopped_by_length",
        "stopped by length",
        "share of texts that had as many tokens as there may be",
        _share("stopped_by_length"),
        higher_is_better=False,
        is_share=True,
    ),
    _spec(
        "new_tokens",
        "new tokens",
        "mean number of tokens generated",
        _mean("new_tokens"),
        higher_is_better=False,
        best=None,
    ),
)

"""Metrics of generated texts, from the numbers that the journal has of each row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.estimates import estimated, mean_of, share_of
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.resampling import Draws, Resampler
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec
from petals_eval.metrics.text_libraries import corpus_columns, corpus_value

__all__ = ["GENERATED_METRICS", "GeneratedRows"]


@dataclass(frozen=True, eq=False)
class GeneratedRows:
    """Rows of generated texts, one item each."""

    rows: ScoredRows

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "GeneratedRows":
        return cls(rows)

    def named(self, name: str) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield a metric's columns, one, or one for each way of taking an answer out of a text ("name[way]"): their
        name, and which rows have a value there, (n,)."""
        for column in self.rows.columns:
            if column == name or column.startswith(f"{name}["):
                yield column, ~np.isnan(self.rows.column(column))

    def counts(self, name: str) -> Floats:
        """Return the counts (n, columns) for BLEU or chrF; NaN in rows that have none."""
        return np.stack([self.rows.column(column) for column in corpus_columns(name)], axis=1)

    def clusters(self, known: NDArray[np.bool_]) -> NDArray[np.int64] | None:
        """Return which cluster each of these rows is of; None where there are none."""
        return None if self.rows.clusters is None else self.rows.chosen(known).clusters


def _note(known: NDArray[np.bool_]) -> str | None:
    if known.all():
        return None
    count, total = int(known.sum()), len(known)
    return (
        f"of {count:,} of {total:,} examples: the others have no right text" if count else "no example has a right text"
    )


def _measured(
    name: str, one: Callable[[str, Floats, NDArray[np.int64] | None, str | None], Metric]
) -> Callable[[GeneratedRows], list[Metric]]:
    def measure(texts: GeneratedRows) -> list[Metric]:
        return [
            one(column, texts.rows.column(column)[known], texts.clusters(known), _note(known))
            if known.any()
            else Metric(column, None, None, _note(known))
            for column, known in texts.named(name)
        ]

    return measure


def _share(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    return _measured(name, lambda column, right, clusters, note: share_of(column, right, clusters, note=note))


def _mean(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    limits = (0.0, np.inf if name == "new_tokens" else 1.0)
    return _measured(
        name,
        lambda column, terms, clusters, note: mean_of(
            column, terms, clusters, limits=limits, note=note, may_be_heavy=name == "new_tokens"
        ),
    )


def _corpus(name: str) -> Callable[[GeneratedRows], list[Metric]]:
    def measure(texts: GeneratedRows) -> list[Metric]:
        counts = texts.counts(name)
        known = np.asarray(~np.isnan(counts).any(axis=1))
        if not known.any():
            return [Metric(name, None, None, _note(known))]
        sums = counts[known].sum(axis=0)
        value = corpus_value(name, sums.tolist())
        # What the score would be without each row: the jackknife, for a score that no formula differentiates.
        without = np.array([corpus_value(name, each) for each in (sums - counts[known]).tolist()])
        influences = without.mean() - without
        limits = (0.0, 100.0)
        return [
            estimated(
                name, value, influences, texts.clusters(known), limits=limits, note=_note(known), may_be_heavy=True
            )
        ]

    return measure


def _terms(name: str) -> Callable[[GeneratedRows], dict[str, Floats]]:
    return lambda texts: {column: texts.rows.column(column) for column, known in texts.named(name) if known.any()}


def _corpus_on_draws(name: str) -> Callable[[GeneratedRows], Resampler]:
    def resampler(texts: GeneratedRows) -> Resampler:
        counts = np.nan_to_num(texts.counts(name))

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

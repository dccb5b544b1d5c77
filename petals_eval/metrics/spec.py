"""What an entry of the tables of metrics is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.resampling import Resampler
from petals_eval.metrics.scored_rows import ScoredRows

__all__ = ["MetricSpec", "View"]

View = Callable[[ScoredRows, Sequence[str]], Any]
"""(rows, label names) -> what some metrics are computed from; its length is that of its rows.

Raises DataError for rows that do not fit.
"""


@dataclass(frozen=True)
class MetricSpec:
    """One metric of one kind of task.

    title: as reports print it.
    measure: of what `view` makes of at least one row; gives one metric, or one a label.
    higher_is_better: otherwise the lower the better. best: what none can be above; None: there is no such value.
    score: for metrics with one value a label, the name before the bracket.
    is_share: a share of the rows, whose interval is Wilson's: it says something of a single example, too.
    view: makes of the scored rows what `measure` is given; computed once for all metrics that share it.
    terms: of a mean over rows, by the name of the metric what each row gives to it, float64 (n,), NaN where a row does
        not count; of a share 0 or 1.
    resampler: of what is no mean over rows, computes it on resamples of the view's rows. None as well as `terms`: there
        is no interval.
    passes: how many passes over the rows one resample costs, beside drawing it.
    needs_scores: whether predictions alone do not do: it needs probabilities or likelihoods.
    """

    name: str
    title: str
    about: str
    measure: Callable[[Any], list[Metric]]
    higher_is_better: bool = True
    score: str | None = None
    best: float | None = 1.0
    is_share: bool = False
    view: View = Answers.of
    terms: Callable[[Any], dict[str, Floats]] | None = None
    resampler: Callable[[Any], Resampler] | None = None
    passes: Callable[[Any], int] = lambda view: 1
    needs_scores: bool = False

    def names(self, label_names: Sequence[str]) -> list[str]:
        """Return the names of the metrics that `measure` gives."""
        return [self.name] if self.score is None else [f"{self.score}[{label}]" for label in label_names]

    def on_draws(self, view: Any) -> Resampler | None:
        """Return what computes the metric on resamples of the view's rows, or None where there is no interval."""
        if self.terms is not None:
            terms = self.terms(view)
            return lambda draws: {name: draws.means(each) for name, each in terms.items()}
        return None if self.resampler is None else self.resampler(view)

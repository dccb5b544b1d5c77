"""What an entry of the tables of metrics is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from petals_eval.metrics.answers import Answers, Metric
from petals_eval.metrics.scored_rows import ScoredRows

__all__ = ["MetricSpec", "View"]

View = Callable[[ScoredRows, Sequence[str], int], Any]
"""(rows, label names, seed of the bootstrap) -> what some metrics are computed from; its length is that of its rows.

Raises DataError for rows that do not fit.
"""


@dataclass(frozen=True)
class MetricSpec:
    """One metric of one kind of task.

    title: as reports print it.
    measure: of what `view` makes of at least one row; gives one metric, or one a label.
    higher_is_better: otherwise the lower the better. best: what none can be above; None: there is no such value.
    score: for metrics with one value a label, the name before the bracket.
    is_share: its interval is Wilson's, which says something of a single example, too.
    view: makes of the scored rows what `measure` is given; computed once for all metrics that share it.
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

    def names(self, label_names: Sequence[str]) -> list[str]:
        """Return the names of the metrics that `measure` gives."""
        return [self.name] if self.score is None else [f"{self.score}[{label}]" for label in label_names]

"""How likely texts are to follow others, and how often greedy decoding writes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.intervals import Floats, percentile_interval, resampled_means, wilson
from petals_eval.metrics.probabilistic import fewer_resamples
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec

__all__ = ["CONTINUATION_METRICS", "Continuations", "perplexity"]


def perplexity(log_likelihoods: Floats, counts: Floats | None = None) -> float:
    """Return exp of minus the mean log-likelihood: per row, or with `counts` per what they count.

    log_likelihoods: (n,), natural logarithms. counts: (n,), such as the tokens of each row. Infinite where that is more
    than a float64 holds.

    >>> round(perplexity(np.log([0.5, 0.125])), 6), round(perplexity(np.log([0.5, 0.125]), np.array([1.0, 3.0])), 6)
    (4.0, 2.0)
    """
    total = len(log_likelihoods) if counts is None else counts.sum()
    with np.errstate(over="ignore"):
        return float(np.exp(-log_likelihoods.sum() / total))


@dataclass(frozen=True, eq=False)
class Continuations:
    """n rows of one target each. log_likelihoods, tokens: float64 (n,). is_greedy: (n,). seed: of the bootstrap."""

    log_likelihoods: Floats
    is_greedy: np.ndarray
    tokens: Floats
    seed: int

    def __len__(self) -> int:
        return len(self.log_likelihoods)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str], seed: int) -> "Continuations":
        """Return the rows of the kind "continuation"."""
        return cls(rows.column("log_likelihood"), rows.column("is_greedy") == 1, rows.column("tokens"), seed)


def measure_greedy(rows: Continuations) -> list[Metric]:
    right = int(rows.is_greedy.sum())
    return [Metric("acc", right / len(rows), wilson(right, len(rows)))]


def measure_perplexity(rows: Continuations) -> list[Metric]:
    return [_perplexity("perplexity", rows.log_likelihoods, np.ones(len(rows)), rows.seed)]


def measure_token_perplexity(rows: Continuations) -> list[Metric]:
    return [_perplexity("token_perplexity", rows.log_likelihoods, rows.tokens, rows.seed)]


def _perplexity(name: str, log_likelihoods: Floats, counts: Floats, seed: int) -> Metric:
    """Return exp of minus the sum of the likelihoods over that of the counts, with an interval over rows."""
    value = perplexity(log_likelihoods, counts)
    if not np.isfinite(value):
        nats = -log_likelihoods.sum() / counts.sum()
        return Metric(name, None, None, f"more than a number holds: exp({nats:.1f})")
    means = resampled_means(np.stack([log_likelihoods, counts], axis=1), seed)
    with np.errstate(over="ignore"):
        resampled = np.exp(-means[:, 0] / means[:, 1])
    if not np.isfinite(resampled).all():
        return Metric(name, value, None, "no interval: resamples reach more than a number holds")
    return Metric(name, value, percentile_interval(resampled), fewer_resamples(len(means)))


# acc and perplexity are those of lm-evaluation-harness 0.4.13's output type `loglikelihood`.
CONTINUATION_METRICS = (
    MetricSpec(
        "perplexity",
        "perplexity",
        "exp of minus the mean log-likelihood of a target, all of its tokens together",
        measure_perplexity,
        higher_is_better=False,
        best=None,
        view=Continuations.of,
    ),
    MetricSpec(
        "token_perplexity",
        "token perplexity",
        "exp of minus the mean log-likelihood of a token",
        measure_token_perplexity,
        higher_is_better=False,
        best=None,
        view=Continuations.of,
    ),
    MetricSpec(
        "acc",
        "acc",
        "share of rows whose target greedy decoding would write",
        measure_greedy,
        is_share=True,
        view=Continuations.of,
    ),
)

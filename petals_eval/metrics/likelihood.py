"""How likely texts are to follow others, and how often greedy decoding writes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.metrics.answers import Metric
from petals_eval.metrics.documents import perplexity_on_draws, perplexity_per
from petals_eval.metrics.estimates import share_of
from petals_eval.metrics.intervals import Floats
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec

__all__ = ["CONTINUATION_METRICS", "Continuations"]


@dataclass(frozen=True, eq=False)
class Continuations:
    """n rows of one target each. log_likelihoods, tokens: float64 (n,). is_greedy: (n,).

    clusters: int64 (n,), of rows that may depend on each other; None: of none.
    """

    log_likelihoods: Floats
    is_greedy: np.ndarray
    tokens: Floats
    clusters: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.log_likelihoods)

    @classmethod
    def of(cls, rows: ScoredRows, label_names: Sequence[str]) -> "Continuations":
        """Return the rows of the kind "continuation"."""
        is_greedy = rows.column("is_greedy") == 1
        return cls(rows.column("log_likelihood"), is_greedy, rows.column("tokens"), rows.clusters)


def measure_greedy(rows: Continuations) -> list[Metric]:
    return [share_of("acc", rows.is_greedy.astype(np.float64), rows.clusters)]


def measure_perplexity(rows: Continuations) -> list[Metric]:
    return perplexity_per("perplexity", rows.log_likelihoods, np.ones(len(rows)), rows.clusters)


def measure_token_perplexity(rows: Continuations) -> list[Metric]:
    return perplexity_per("token_perplexity", rows.log_likelihoods, rows.tokens, rows.clusters)


def greedy_terms(rows: Continuations) -> dict[str, Floats]:
    return {"acc": rows.is_greedy.astype(np.float64)}


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
        resampler=lambda rows: perplexity_on_draws("perplexity", rows.log_likelihoods, np.ones(len(rows))),
    ),
    MetricSpec(
        "token_perplexity",
        "token perplexity",
        "exp of minus the mean log-likelihood of a token",
        measure_token_perplexity,
        higher_is_better=False,
        best=None,
        view=Continuations.of,
        resampler=lambda rows: perplexity_on_draws("token_perplexity", rows.log_likelihoods, rows.tokens),
    ),
    MetricSpec(
        "acc",
        "acc",
        "share of rows whose target greedy decoding would write",
        measure_greedy,
        is_share=True,
        view=Continuations.of,
        terms=greedy_terms,
    ),
)

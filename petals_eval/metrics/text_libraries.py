"""Metrics of generated texts that other libraries compute: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

They are an extra: `pip install "petals-eval[text-metrics]"`. What is kept of a row are numbers: for BLEU and chrF,
which are no means over rows, the counts of n-grams that they are computed from. These add up, so the score of all rows,
or of a resample of them, needs no text.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

from petals_eval.errors import ConfigError

__all__ = [
    "CORPUS_SCORES",
    "LIBRARIES",
    "ROUGE",
    "check_library",
    "corpus_columns",
    "corpus_counts",
    "corpus_value",
    "rouge",
]

ROUGE = ("rouge1", "rouge2", "rougeL")
_BLEU_ORDERS, _CHRF_ORDERS = range(1, 5), range(1, 7)
CORPUS_SCORES = {
    "bleu": (
        *("bleu/text_length", "bleu/reference_length"),
        *(f"bleu/right_{order}" for order in _BLEU_ORDERS),
        *(f"bleu/of_{order}" for order in _BLEU_ORDERS),
    ),
    "chrf": tuple(f"chrf/{what}_{order}" for order in _CHRF_ORDERS for what in ("of_text", "of_reference", "right")),
}
"""The columns of each score: counts of n-grams, by their length."""
LIBRARIES = {**dict.fromkeys(CORPUS_SCORES, "sacrebleu"), **dict.fromkeys(ROUGE, "rouge_score")}


def check_library(metric: str) -> None:
    """Raise ConfigError where a metric needs a library that is not installed."""
    library = LIBRARIES.get(metric)
    if library is None:
        return
    try:
        import_module(library)
    except ImportError:
        raise ConfigError(
            f"{metric} is computed by {library.replace('_', '-')}, which is not installed: "
            'pip install "petals-eval[text-metrics]", or leave it out.'
        ) from None


def corpus_columns(metric: str) -> tuple[str, ...]:
    """Return the names of the counts that BLEU or chrF is computed from."""
    return CORPUS_SCORES[metric]


def corpus_counts(metric: str, text: str, references: Sequence[str]) -> tuple[float, ...]:
    """Return one row's counts for BLEU or chrF, under `corpus_columns`."""
    if metric == "bleu":
        score = _sacrebleu("bleu").corpus_score([text], [[reference] for reference in references])
        return (float(score.sys_len), float(score.ref_len), *map(float, score.counts), *map(float, score.totals))
    # chrF's counts have no public name; BLEU's way to them is the same in all metrics of sacrebleu since 2.0.
    (counts,) = _sacrebleu("chrf")._extract_corpus_statistics([text], [[reference] for reference in references])
    return tuple(map(float, counts))


def corpus_value(metric: str, sums: Sequence[float]) -> float:
    """Return BLEU or chrF, 0 to 100, of rows whose counts add up to these: sacrebleu's own defaults."""
    whole = [round(each) for each in sums]
    if metric == "bleu":
        right, of = whole[2 : 2 + len(_BLEU_ORDERS)], whole[2 + len(_BLEU_ORDERS) :]
        return float(_sacrebleu("bleu").compute_bleu(right, of, whole[0], whole[1], smooth_method="exp").score)
    return float(_sacrebleu("chrf")._compute_score_from_stats(whole).score)


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return the F-measures of ROUGE-1, -2 and -L, in [0, 1], against the right text that fits best; no stemming."""
    scores = _rouge_scorer().score_multi(list(references), text)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@cache
def _sacrebleu(metric: str) -> Any:
    metrics = import_module("sacrebleu.metrics")
    return metrics.BLEU(force=True) if metric == "bleu" else metrics.CHRF()


@cache
def _rouge_scorer() -> Any:
    return import_module("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=False)

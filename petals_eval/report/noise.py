"""Numerical noise as reports write it: beside each metric, and in lines on how it was measured."""

from collections.abc import Sequence

from petals_eval.report.numbers import metric_title
from petals_eval.runs import AdapterResult, NumericalNoise, Recomputed
from petals_eval.text import number_text, plural, printable

__all__ = ["NOISE_TITLE", "noise_lines", "noise_range_text"]

NOISE_TITLE = "within noise"

_WAYS = {"batching": "in another batching", "replica": "on other servers", "lossless": "without the lossy wire"}
_NUMBERS = {"margin": "margins", "log_likelihood": "log-likelihoods", "prediction": "predictions"}


def noise_range_text(result: AdapterResult, name: str) -> str:
    """Return between which values a metric lies within noise; an empty text where it is one, or nobody knows."""
    low, high = (result.noise.ranges.get(name) if result.noise is not None else None) or (None, None)
    if low is None or high is None or low == high:
        return ""
    return " - ".join(number_text(bound, 4, beside=high) for bound in (low, high))


def noise_lines(results: Sequence[AdapterResult], *, with_ranges: bool) -> list[str]:
    """Return lines on the noise of each result, those that say the same together.

    with_ranges: whether they say the range of each first metric, too, where no column of a table has it.
    """
    by_text: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        if result.noise is not None:
            by_text.setdefault(tuple(_lines(result, result.noise, with_ranges)), []).append(result.adapter)
    found = []
    for texts, adapters in by_text.items():
        whose = "" if len(adapters) == len(results) else f" ({', '.join(adapters)})"
        found += [printable(f"numerical noise{whose}: {text}") for text in texts]
    return found


def _lines(result: AdapterResult, noise: NumericalNoise, with_ranges: bool) -> list[str]:
    lines = []
    if noise.margin is not None and noise.unsure is not None and noise.share is not None:
        lines.append(_unsure_text(result, noise, with_ranges))
    only = ", which is all that could be tried" if noise.ways == ("batching",) else ""
    lines += [f"{_moved_text(each)}{only}" for each in noise.recomputed]
    return [*lines, *noise.notes]


def _unsure_text(result: AdapterResult, noise: NumericalNoise, with_ranges: bool) -> str:
    if not noise.unsure:
        return f"no margin of {plural(result.n_scored, 'prediction')} is below {noise.margin:.2g}"
    share = f"{noise.unsure:,} of {plural(result.n_scored, 'prediction')} ({100 * (noise.share or 0.0):.2g}%)"
    text = f"{share} have a margin below {noise.margin:.2g}: rounding may turn them"
    name = next((name for name in noise.ranges if noise_range_text(result, name)), None)
    if not with_ranges or name is None:
        return text
    return f"{text}; {metric_title(name)} {noise_range_text(result, name)} within that"


def _moved_text(moved: Recomputed) -> str:
    what = _NUMBERS.get(moved.number) or f"margins of {metric_title(moved.number)}"
    changed = f", {plural(moved.changed, 'prediction')} changed" if moved.changed else ""
    return (
        f"{plural(moved.rows, 'row')} again {_WAYS[moved.way]}: {what} moved by up to {moved.largest:.2g}, "
        f"{moved.mean:.2g} on average{changed}"
    )

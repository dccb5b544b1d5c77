"""Numerical noise as reports write it: beside each metric, and in lines on how it was measured."""

from collections.abc import Sequence

from petals_eval.report.numbers import metric_title
from petals_eval.runs import AdapterResult, NumericalNoise, Recomputed
from petals_eval.text import listed, number_text, plural, printable

__all__ = ["NOISE_TITLE", "noise_lines", "noise_range_text"]

NOISE_TITLE = "within noise"

_WAYS = {"batching": "in another batching", "replica": "on other servers", "lossless": "without the lossy wire"}
_ONLY_BATCHING = "; no second server to try"
_NUMBERS = {"margin": "margins", "log_likelihood": "log-likelihoods", "prediction": "predictions"}


def noise_range_text(result: AdapterResult, name: str) -> str:
    """Return between which values a metric lies within noise; an empty text where it is one, or nobody knows."""
    low, high = (result.noise.ranges.get(name) if result.noise is not None else None) or (None, None)
    if low is None or high is None or low == high:
        return ""
    return " - ".join(number_text(bound, 4, beside=high) for bound in (low, high))


def noise_lines(results: Sequence[AdapterResult], *, is_report: bool = False) -> list[str]:
    """Return lines on the noise of each result, those that say the same together.

    is_report: whether there is room to say how far numbers moved in each way, and ranges have a table of their own.
    """
    by_text: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        if result.noise is not None:
            with_range = not is_report and len(results) > 1
            said = _in_full(result, result.noise) if is_report else _in_short(result, result.noise, with_range)
            by_text.setdefault(tuple(said), []).append(result.adapter)
    found = []
    for texts, adapters in by_text.items():
        whose = "" if len(adapters) == len(results) else f" ({', '.join(adapters)})"
        found += [printable(f"numerical noise{whose}: {text}") for text in texts]
    return found


def _in_short(result: AdapterResult, noise: NumericalNoise, with_range: bool) -> list[str]:
    if not noise.recomputed:
        return list(noise.notes)
    ways = listed([_WAYS[way] for way in noise.ways])
    only = _ONLY_BATCHING if noise.ways == ("batching",) else ""
    rows = plural(max(each.rows for each in noise.recomputed), "row")
    how = f"({rows} computed again {ways}{only})"
    if noise.margin is None:
        return [f"{_moved_text(each)}{only}" for each in noise.recomputed]
    if not noise.unsure:
        return [f"no prediction is close enough for rounding to flip it {how}"]
    return [f"{_unsure_text(result, noise, with_range)} {how}"]


def _in_full(result: AdapterResult, noise: NumericalNoise) -> list[str]:
    unsure = [] if noise.margin is None else [_unsure_text(result, noise, with_range=False)]
    only = _ONLY_BATCHING if noise.ways == ("batching",) else ""
    return [*unsure, *(f"{_moved_text(each)}{only}" for each in noise.recomputed), *noise.notes]


def _unsure_text(result: AdapterResult, noise: NumericalNoise, with_range: bool) -> str:
    if not noise.unsure:
        return f"no margin of {plural(result.n_scored, 'prediction')} is below {noise.margin:.2g}"
    share = f"{noise.unsure:,} of {plural(result.n_scored, 'prediction')} ({100 * (noise.share or 0.0):.2g}%)"
    text = f"{share} have a margin below {noise.margin:.2g}, so that rounding may turn them"
    name = next((name for name in noise.ranges if noise_range_text(result, name)), None)
    if not with_range or name is None:
        return text
    return f"{text}; {metric_title(name)} {noise_range_text(result, name)} within that"


def _moved_text(moved: Recomputed) -> str:
    what = _NUMBERS.get(moved.number) or f"margins of {metric_title(moved.number)}"
    changed = f", {plural(moved.changed, 'prediction')} changed" if moved.changed else ""
    return (
        f"{plural(moved.rows, 'row')} computed again {_WAYS[moved.way]}: {what} moved by up to {moved.largest:.2g}, "
        f"{moved.mean:.2g} on average{changed}"
    )

"""Differences as text, and as a table for papers and for other programs: a row for each metric of each pair."""

import csv
import io
from collections.abc import Sequence

from petals_eval.metrics.differences import EXACT, Difference
from petals_eval.metrics.paired import LEVEL, POWER
from petals_eval.runs.tables import latex_table, markdown_table, metric_title
from petals_eval.text import number_text, p_value_text, printable

__all__ = [
    "DETECTABLE",
    "as_csv",
    "as_latex",
    "as_lines",
    "as_markdown",
    "methods_of",
    "pair_text",
    "signed_interval_text",
    "signed_text",
    "tested_text",
]

DETECTABLE = f"the smallest difference found with {POWER:.0%} power at the {LEVEL:.0%} level"
"""What stands in the column "detectable" of a report."""


def as_csv(differences: Sequence[Difference]) -> str:
    """Return a csv with a header: of each difference its sides, values, 95% interval, p-values and rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("metric", "first", "second", "first_value", "second_value", "value")
    more = ("p_value", "p_holm", "rows", "minimum_detectable", "method")
    writer.writerow([*names[:-1], "difference", "low", "high", *more])
    for each in differences:
        cells = [getattr(each, name) for name in names] + [*(each.ci95 or (None, None))]
        writer.writerow(["" if cell is None else cell for cell in (*cells, *(getattr(each, name) for name in more))])
    return text.getvalue()


def as_markdown(differences: Sequence[Difference]) -> str:
    """Return a Markdown table, differences with their 95% intervals in brackets."""
    return markdown_table(_cells(differences))


def as_latex(differences: Sequence[Difference]) -> str:
    """Return a LaTeX tabular with the rules of booktabs, differences with their 95% intervals in brackets."""
    lines = _cells(differences)
    corrected = " (corrected for all pairs of a metric)" if len(_pairs(differences)) > 1 else ""
    about = f"brackets: 95% intervals; these and p{corrected}: {'; '.join(methods_of(differences))}"
    return latex_table(lines, left=len(lines[0]) - 4, about=about)


def as_lines(differences: Sequence[Difference], *, most: int = 20) -> list[str]:
    """Return a line for each of the first `most` differences, with its interval and p-value."""
    lines = []
    for each in differences[:most]:
        tested = tested_text(each)
        line = f"{pair_text(each.first, each.second)}: {metric_title(each.metric)} {signed_text(each)}"
        lines.append(f"{line} ({tested})" if tested else line)
    more = len(differences) - most
    return lines + ([f"and {more} more: see differences"] if more > 0 else [])


def pair_text(first: str, second: str, *, longest: int = 400) -> str:
    """Return what a difference of two sides is called, which says its sign. longest: of each name."""
    return f"{printable(first, longest=longest)} - {printable(second, longest=longest)}"


def signed_text(difference: Difference) -> str:
    """Return a difference with its sign, in the digits of the two values; "-" where there is none."""
    if difference.value is None:
        return "-"
    beside = max(abs(difference.first_value or 0.0), abs(difference.second_value or 0.0))
    return _signed(difference.value, 4, beside)


def signed_interval_text(difference: Difference) -> str:
    """Return the interval of a difference with signs, one digit shorter; an empty text where there is none."""
    if difference.ci95 is None:
        return ""
    beside = max(abs(difference.first_value or 0.0), abs(difference.second_value or 0.0))
    return " to ".join(_signed(bound, 3, beside) for bound in difference.ci95)


def tested_text(difference: Difference) -> str:
    """Return a difference's interval and p-value, the corrected one where several were tested."""
    p_value = difference.p_value if difference.p_holm is None else difference.p_holm
    parts = [signed_interval_text(difference), "" if p_value is None else f"p {p_value_text(p_value)}"]
    return ", ".join(filter(None, parts))


def methods_of(found: Sequence[Difference]) -> list[str]:
    """Return by which method the intervals and tests of which metrics are."""
    methods = _methods(found)
    lines = []
    for method, metrics in methods.items():
        whose = "the others: " if method == list(methods)[-1] else f"{', '.join(map(metric_title, metrics))}: "
        lines.append(method if len(methods) == 1 else f"{whose}{method}")
    return lines


def _methods(found: Sequence[Difference]) -> dict[str, list[str]]:
    by_method: dict[str, list[str]] = {}
    for each in found:
        metrics = by_method.setdefault(each.method, [])
        if each.metric not in metrics:
            metrics.append(each.metric)
    return dict(sorted(by_method.items(), key=lambda item: item[0] != EXACT))


def _cells(differences: Sequence[Difference]) -> list[list[str]]:
    """Return a head and lines: of one pair its names stand in the head, of several before the values."""
    pairs = _pairs(differences)
    if len(pairs) == 1:
        [pair] = pairs
        lines = [["metric", *map(printable, pair), pair_text(*pair), "p"]]
        return lines + [[metric_title(each.metric), *_numbers(each, each.p_value)] for each in differences]
    lines = [["metric", "first", "second", "value of first", "of second", "first - second", "p (Holm)"]]
    for each in differences:
        names = (metric_title(each.metric), printable(each.first), printable(each.second))
        lines.append([*names, *_numbers(each, each.p_holm)])
    return lines


def _pairs(differences: Sequence[Difference]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each.first, each.second) for each in differences))


def _numbers(each: Difference, p_value: float | None) -> list[str]:
    values = ["-" if value is None else number_text(value) for value in (each.first_value, each.second_value)]
    interval = signed_interval_text(each).replace(" to ", ", ")
    return [*values, f"{signed_text(each)} [{interval}]" if interval else signed_text(each), p_value_text(p_value)]


def _signed(value: float, decimals: int, beside: float) -> str:
    text = number_text(value, decimals, beside=beside)
    return text if text.startswith("-") else f"+{text}"

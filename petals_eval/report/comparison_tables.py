"""A comparison as a table, for papers and for other programs: a row for each metric of each pair."""

import csv
import io
from collections.abc import Sequence

from petals_eval.metrics.differences import Difference
from petals_eval.report.numbers import metric_title, signed_interval_text, signed_text
from petals_eval.runs.tables import latex_table, markdown_table
from petals_eval.text import number_text, p_value_text, printable

__all__ = ["as_csv", "as_latex", "as_markdown"]


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
    return latex_table(lines, left=len(lines[0]) - 4)


def _cells(differences: Sequence[Difference]) -> list[list[str]]:
    """Return a head and lines: of one pair its names stand in the head, of several before the values."""
    pairs = list(dict.fromkeys((each.first, each.second) for each in differences))
    if len(pairs) == 1:
        lines = [["metric", *(printable(name) for name in pairs[0]), "difference", "p"]]
        return lines + [[metric_title(each.metric), *_numbers(each, each.p_value)] for each in differences]
    lines = [["metric", "first", "second", "value of first", "of second", "difference", "p (Holm)"]]
    for each in differences:
        names = (metric_title(each.metric), printable(each.first), printable(each.second))
        lines.append([*names, *_numbers(each, each.p_holm)])
    return lines


def _numbers(each: Difference, p_value: float | None) -> list[str]:
    values = ["-" if value is None else number_text(value) for value in (each.first_value, each.second_value)]
    interval = signed_interval_text(each).replace(" to ", ", ")
    return [*values, f"{signed_text(each)} [{interval}]" if interval else signed_text(each), p_value_text(p_value)]

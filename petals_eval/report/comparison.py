"""A comparison on the terminal, or as plain text where there is none."""

from collections.abc import Iterable, Mapping
from itertools import islice

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from petals_eval.comparison.compare import Comparison
from petals_eval.comparison.tables import DETECTABLE, methods_of, pair_text, signed_interval_text, signed_text
from petals_eval.metrics.differences import Difference
from petals_eval.report.numbers import metric_title
from petals_eval.report.tables import NAME_WIDTH, fitting_table
from petals_eval.text import number_text, p_value_text, plural, printable

__all__ = ["print_comparison", "said_of"]

TEXT_CHARACTERS = 300  # of a row's text


def print_comparison(
    comparison: Comparison, console: Console, *, changed_rows: int = 10, texts: Mapping[str, str] | None = None
) -> None:
    """Print every difference with its interval, its test and what could be detected.

    changed_rows: of a single pair, how many of the rows whose prediction changed are shown. texts: theirs, by key, to
    be shown below; None: keys alone.
    """
    pairs = comparison.pairs
    heads = ["difference", "95% interval", "p", *(["p (Holm)"] if len(pairs) > 1 else []), "detectable"]
    if len(pairs) == 1:
        names = [printable(name, longest=NAME_WIDTH) for name in pairs[0]]
        rows = [
            [metric_title(each.metric), *_values(each), *_cells(each, several=False)] for each in comparison.differences
        ]
        heads[0] = " - ".join(names)
        tables = [fitting_table(["", *names, *heads], rows, console.width)]
    else:
        tables = [
            fitting_table(
                [metric_title(metric), *heads],
                [[_pair(each), *_cells(each, several=True)] for each in alike],
                console.width,
            )
            for metric, alike in _by_metric(comparison.differences)
        ]
    for line in (line for table in tables for line in table):
        console.print(line, soft_wrap=True)
    for below in _below(comparison):
        console.print(Padding(Text(below), (0, 0, 0, 2), expand=False))
    if len(pairs) == 1 and changed_rows and comparison.changed[pairs[0]]:
        console.print(Text(""))
        for line in _changed(comparison, changed_rows, console.width):
            console.print(line, soft_wrap=True)
        for row in islice(comparison.changed_rows(*pairs[0]), changed_rows if texts else 0):
            text = printable((texts or {}).get(row.key, ""), longest=TEXT_CHARACTERS)
            console.print(Padding(Text(f"row {printable(row.key)}: {text}"), (0, 0, 0, 2), expand=False))


def _by_metric(found: Iterable[Difference]) -> list[tuple[str, list[Difference]]]:
    by_metric: dict[str, list[Difference]] = {}
    for each in found:
        by_metric.setdefault(each.metric, []).append(each)
    return list(by_metric.items())


def _pair(each: Difference) -> str:
    return pair_text(each.first, each.second, longest=NAME_WIDTH)


def _values(each: Difference) -> list[str]:
    return ["-" if value is None else number_text(value) for value in (each.first_value, each.second_value)]


def _cells(each: Difference, *, several: bool) -> list[str]:
    detectable = "-" if each.minimum_detectable is None else number_text(each.minimum_detectable, 3)
    corrected = [p_value_text(each.p_holm)] if several else []
    return [signed_text(each), signed_interval_text(each), p_value_text(each.p_value), *corrected, detectable]


def _below(comparison: Comparison) -> list[str]:
    """Return what a reader must know beside the numbers."""
    lines = [f"{plural(comparison.rows, 'row')}, matched by key and content"]
    lines += [f"not compared: {plural(n, 'row')} of {name} alone" for name, n in comparison.left_out.items()]
    for pair in comparison.pairs:
        whose = f"{pair[0]} - {pair[1]}: " if len(comparison.pairs) > 1 else ""
        found = said_of(comparison, pair)
        if found and len(comparison.pairs) <= 3:
            lines.append(whose + " · ".join(found))
    lines += methods_of(comparison.differences)
    lines.append(f"detectable: {DETECTABLE}")
    notes: dict[str, dict[str, None]] = {}
    for each in comparison.differences:
        if each.note is not None:
            notes.setdefault(each.note, {})[metric_title(each.metric)] = None
    every = {metric_title(each.metric) for each in comparison.differences}
    lines += [note if whose.keys() == every else f"{', '.join(whose)}: {note}" for note, whose in notes.items()]
    return [printable(line) for line in lines]


def said_of(comparison: Comparison, pair: tuple[str, str]) -> list[str]:
    """Return how many predictions of a pair differ, and in how many rows one side alone is right."""
    changed = comparison.changed[pair]
    found = [] if changed is None else [f"{plural(changed, 'prediction')} changed"]
    for each in comparison.of(*pair).values():
        if each.only_first is not None and "[" not in each.metric:
            found.append(
                f"{metric_title(each.metric)}: only {pair[0]} is right in {plural(each.only_first, 'row')}, "
                f"only {pair[1]} in {each.only_second:,}"
            )
    return found


def _changed(comparison: Comparison, most: int, width: int) -> list[Text]:
    first, second = comparison.pairs[0]
    rows = [
        [printable(str(cell), longest=NAME_WIDTH) for cell in (each.key, each.label, each.first, each.second)]
        + [each.change or ""]
        for each in islice(comparison.changed_rows(first, second), most)
    ]
    total = comparison.changed[first, second] or 0
    title = "row" if total <= most else f"row (first {most} of {total:,})"
    heads = [title, "label", printable(first, longest=NAME_WIDTH), printable(second, longest=NAME_WIDTH), "change"]
    return fitting_table(heads, rows, width)

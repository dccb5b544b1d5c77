"""The result of a run on the terminal, or as plain text where there is none."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from petals_eval.metrics import Metric
from petals_eval.report.numbers import (
    counts_line,
    counts_of,
    interval_text,
    interval_title,
    metric_names,
    metric_title,
    noise_line,
    notes,
    swarm_line,
    value_text,
    wire_lines,
)
from petals_eval.runs import AdapterResult, GroupResult, RunResult
from petals_eval.text import printable

__all__ = ["print_group", "print_result"]

NAME_WIDTH = 24  # of an adapter at the head of its column


def print_result(result: RunResult, console: Console, *, folder: Path | None = None) -> None:
    """Print the metrics with their intervals, several adapters side by side, and the counts.

    console: of `console_for`; everything printed is plain text to it, never markup.
    """
    adapters = list(result.adapters.values())
    tables = [_one(adapters[0])] if len(adapters) == 1 else _side_by_side(adapters, console.width)
    for line in itertools.chain(*tables):
        console.print(line, soft_wrap=True)
    for below in _below(result, adapters):
        console.print(Padding(Text(below), (0, 0, 0, 2), expand=False))
    if folder is not None:
        console.print(Text(f"run folder: {printable(str(folder))}"), soft_wrap=True)


def print_group(result: GroupResult, console: Console, *, folder: Path | None = None) -> None:
    """Print each task's metrics and their means over tasks and over rows: a table for each adapter."""
    names = result.metric_names
    for adapter in result.adapters:
        means = result.means(adapter)
        rows = [
            [printable(task, longest=NAME_WIDTH), f"{each.n_scored:,}", *(value_text(each.metrics[n]) for n in names)]
            for task, each in result.of(adapter).items()
        ]
        rows.append(["mean over tasks", "", *(value_text(Metric(n, means[n].over_tasks)) for n in names)])
        rows.append(["mean over rows", "", *(value_text(Metric(n, means[n].over_rows)) for n in names)])
        head = printable(adapter, longest=NAME_WIDTH) if len(result.adapters) > 1 else ""
        for line in _table([head, "scored", *map(metric_title, names)], rows):
            console.print(line, soft_wrap=True)
    if not names:
        console.print(Text("  no metric that all of these tasks have: their run folders have the metrics of each"))
    failed = sum(each.n_failed for task in result.tasks.values() for each in task.adapters.values())
    if failed:
        console.print(Text(f"  {failed:,} examples failed: failures.jsonl in their task's folder says why"))
    if folder is not None:
        console.print(Text(f"run folders: {printable(str(folder))}"), soft_wrap=True)


def _below(result: RunResult, adapters: Sequence[AdapterResult]) -> list[str]:
    lines = []
    if result.without_prompts is not None:
        lines.append(_comparison(result.without_prompts))
    lines += notes(adapters)
    if len(adapters) == 1:
        lines.append(counts_line(adapters[0]))
    lines.append(swarm_line(result))
    lines += wire_lines(result.wire)
    noise = noise_line(result)
    if noise is not None:
        lines.append(noise)
    return lines


def _comparison(bare: AdapterResult) -> str:
    name = "accuracy" if "accuracy" in bare.metrics else next(iter(bare.metrics), "accuracy")
    metric = bare.metrics.get(name)
    interval = interval_text(metric)
    return f"without the prompts: {metric_title(name)} {value_text(metric)}" + (f" ({interval})" if interval else "")


def _one(result: AdapterResult) -> list[Text]:
    rows = [[metric_title(name), value_text(metric), interval_text(metric)] for name, metric in result.metrics.items()]
    return _table(["", "mean" if result.draws else "value", interval_title([result])], rows)


def _side_by_side(adapters: Sequence[AdapterResult], width: int) -> list[list[Text]]:
    """Return one table if the terminal is wide enough; else intervals below their values; else several tables."""
    names = metric_names(adapters)
    beside = _columns(adapters, names, below=False)
    if max(cell_len(line.plain) for line in beside) <= width:
        return [beside]
    counted = {what for each in adapters for what in counts_of(each)}
    first = max(map(cell_len, [*map(metric_title, names), *counted])) + 4
    cells = [value_text(each.metrics.get(name)) for name in names for each in adapters]
    cells += [interval_text(each.metrics.get(name)) for name in names for each in adapters]
    widest = max(map(cell_len, [*map(_head, adapters), *cells]))
    at_once = max(1, (width - first) // (widest + 2))
    return [_columns(adapters[i : i + at_once], names, below=True) for i in range(0, len(adapters), at_once)]


def _columns(adapters: Sequence[AdapterResult], names: Sequence[str], *, below: bool) -> list[Text]:
    """below: intervals stand below their values."""
    rows = []
    for name in names:
        metrics = [each.metrics.get(name) for each in adapters]
        intervals = [interval_text(metric) for metric in metrics]
        if below:
            rows.append([metric_title(name), *map(value_text, metrics)])
            rows.append(["", *intervals])
        else:
            beside = [f" ({interval})" if interval else "" for interval in intervals]
            rows.append([metric_title(name), *(value_text(m) + b for m, b in zip(metrics, beside, strict=True))])
    counts = [counts_of(each) for each in adapters]
    rows += [[what, *(count.get(what, "") for count in counts)] for what in dict.fromkeys(w for c in counts for w in c)]
    return _table(["", *(_head(each) for each in adapters)], [row for row in rows if any(row)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Text]:
    """Return lines of columns, each as wide as its widest cell, without blanks at their ends."""
    widths = [max(cell_len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for line in [heads, *rows]:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        lines.append(Text(f"  {'  '.join(cells)}".rstrip(), style="bold" if line is heads else ""))
    return lines


def _head(result: AdapterResult) -> str:
    return printable(result.adapter, longest=NAME_WIDTH)

"""The result of a run on the terminal, or as plain text where there is none."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from petals_eval.comparison.tables import pair_text, signed_interval_text, signed_text, tested_text
from petals_eval.metrics import Metric
from petals_eval.metrics.differences import Difference
from petals_eval.report.noise import NOISE_TITLE, noise_lines, noise_range_text
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
from petals_eval.report.tables import NAME_WIDTH, text_table
from petals_eval.runs import AdapterResult, GroupResult, RunResult
from petals_eval.text import printable

__all__ = ["print_group", "print_result"]


def print_result(result: RunResult, console: Console, *, folder: Path | None = None) -> None:
    """Print the metrics with their intervals, several adapters side by side, and the counts.

    console: of `console_for`; everything printed is plain text to it, never markup.
    """
    adapters = list(result.adapters.values())
    tables = [_one(adapters[0])] if len(adapters) == 1 else _side_by_side(result, adapters, console.width)
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
        for line in text_table([head, "scored", *map(metric_title, names)], rows):
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
        lines.append(_comparison(result.without_prompts, result.differences))
    lines += notes(adapters)
    if len(adapters) == 1:
        lines.append(counts_line(adapters[0]))
    lines.append(swarm_line(result))
    lines += wire_lines(result.wire)
    lines += noise_lines(adapters)
    noise = noise_line(result)
    if noise is not None:
        lines.append(noise)
    return lines


def _comparison(bare: AdapterResult, differences: Sequence[Difference]) -> str:
    name = "accuracy" if "accuracy" in bare.metrics else next(iter(bare.metrics), "accuracy")
    metric = bare.metrics.get(name)
    interval = interval_text(metric)
    line = f"without the prompts: {metric_title(name)} {value_text(metric)}" + (f" ({interval})" if interval else "")
    found = next((each for each in differences if (each.metric, each.second) == (name, bare.adapter)), None)
    return line if found is None else f"{line}; difference {signed_text(found)} ({signed_interval_text(found)})"


def _one(result: AdapterResult) -> list[Text]:
    rows = [
        [metric_title(name), value_text(metric), interval_text(metric), noise_range_text(result, name)]
        for name, metric in result.metrics.items()
    ]
    heads = ["", "mean" if result.draws else "value", interval_title([result]), NOISE_TITLE]
    if not any(row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return text_table(heads, rows)


@dataclass(frozen=True)
class _Column:
    """values: by metric, a value and what stands in brackets behind it. counts: as `counts_of` has them."""

    head: str
    values: Mapping[str, tuple[str, str]]
    counts: Mapping[str, str]


def _side_by_side(result: RunResult, adapters: Sequence[AdapterResult], width: int) -> list[list[Text]]:
    """Return one table if the terminal is wide enough; else intervals below their values; else several tables."""
    names = metric_names(adapters)
    columns = [*map(_of_adapter, adapters), *_of_differences(result, names)]
    beside = _columns(columns, names, below=False)
    if max(cell_len(line.plain) for line in beside) <= width:
        return [beside]
    counted = {what for each in columns for what in each.counts}
    first = max(map(cell_len, [*map(metric_title, names), *counted])) + 4
    cells = [cell for each in columns for pair in each.values.values() for cell in pair]
    widest = max(map(cell_len, [*(each.head for each in columns), *cells]))
    at_once = max(1, (width - first) // (widest + 2))
    return [_columns(columns[i : i + at_once], names, below=True) for i in range(0, len(columns), at_once)]


def _of_adapter(result: AdapterResult) -> _Column:
    values = {name: (value_text(metric), interval_text(metric)) for name, metric in result.metrics.items()}
    return _Column(printable(result.adapter, longest=NAME_WIDTH), values, counts_of(result))


def _of_differences(result: RunResult, names: Sequence[str]) -> list[_Column]:
    """Return a column for each adapter beside the first: how much that one differs from it."""
    others = [name for name in result.adapters if name != result.first.adapter]
    found = []
    for other in others:
        by_metric = {each.metric: each for each in result.differences if each.second == other}
        shared = [by_metric[name] for name in names if name in by_metric]
        values = {each.metric: (signed_text(each), tested_text(each)) for each in shared}
        if values:
            # Names so short that their pair is no wider than the cells below.
            pair = pair_text(result.first.adapter, other, longest=NAME_WIDTH * 2 // 3)
            found.append(_Column(pair, values, {}))
    return found


def _columns(columns: Sequence[_Column], names: Sequence[str], *, below: bool) -> list[Text]:
    """below: intervals stand below their values."""
    rows = []
    for name in names:
        cells = [each.values.get(name, ("", "")) for each in columns]
        if below:
            rows.append([metric_title(name), *(value for value, _ in cells)])
            rows.append(["", *(interval for _, interval in cells)])
        else:
            rows.append([metric_title(name), *(f"{value} ({inside})" if inside else value for value, inside in cells)])
    counted = dict.fromkeys(what for each in columns for what in each.counts)
    rows += [[what, *(each.counts.get(what, "") for each in columns)] for what in counted]
    return text_table(["", *(each.head for each in columns)], [row for row in rows if any(row)])

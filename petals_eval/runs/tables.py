"""Results as a table, for papers and for other programs: a row for each adapter of a run, a column for each metric."""

import csv
import io
import re
from collections.abc import Mapping, Sequence

from petals_eval.metrics import Metric, title_of
from petals_eval.text import number_text, printable

__all__ = [
    "ResultRow",
    "as_csv",
    "as_latex",
    "as_markdown",
    "latex_table",
    "markdown_table",
    "metric_title",
    "result_cells",
]

ResultRow = tuple[dict[str, object], Mapping[str, Metric]]
"""What a row says of its run, by column, and its metrics."""

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def as_csv(rows: Sequence[ResultRow]) -> str:
    """Return a csv with a header: of each metric its value, and as `<metric>_low` and `<metric>_high` its interval."""
    names = _names(rows)
    about = _about(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*about, *(column for name in names for column in (name, f"{name}_low", f"{name}_high"))])
    for said, metrics in rows:
        cells: list[object] = [said.get(column, "") for column in about]
        for name in names:
            metric = metrics.get(name)
            cells += [None if metric is None else metric.value, *((metric and metric.ci95) or (None, None))]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def as_markdown(rows: Sequence[ResultRow]) -> str:
    """Return a Markdown table, values with their intervals in brackets."""
    return markdown_table(result_cells(rows))


def as_latex(rows: Sequence[ResultRow]) -> str:
    """Return a LaTeX tabular with the rules of booktabs, values with their intervals in brackets."""
    return latex_table(result_cells(rows), left=len(_shown(rows)), about="brackets: 95% intervals")


def metric_title(name: str) -> str:
    """Return "F1 (macro)" for "f1_macro", "recall [human]" for "recall[human]"."""
    return printable(title_of(name), longest=60)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells, the first line as its head."""
    escaped = [[re.sub(r"([\\`*_{}\[\]<>|#!~&])", r"\\\1", cell) for cell in line] for line in lines]
    escaped.insert(1, ["---"] * len(escaped[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def latex_table(lines: Sequence[Sequence[str]], *, left: int, about: str) -> str:
    """Return a LaTeX tabular with the rules of booktabs, the first line as its head.

    left: how many columns from the left are texts; the others are numbers, flush right. about: what a comment on top
    says of these.
    """
    heads, *body = [["".join(_LATEX.get(each, each) for each in cell) for cell in line] for line in lines]
    heads = [head.replace(" - ", " $-$ ") for head in heads]
    body = [line[:left] + [_in_math(cell) for cell in line[left:]] for line in body]
    columns = "l" * left + "r" * (len(heads) - left)
    rows = "".join(f"{' & '.join(line)} \\\\\n" for line in body)
    return (
        f"% needs \\usepackage{{booktabs}}; {about}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(heads)} \\\\\n\\midrule\n{rows}"
        "\\bottomrule\n\\end{tabular}\n"
    )


def result_cells(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Return a head and a line for each row: what tells it apart, and its values with their intervals in brackets."""
    names, about = _names(rows), _shown(rows)
    lines = [[*about, *(metric_title(name) for name in names)]]
    for said, metrics in rows:
        lines.append([printable(str(said[column])) for column in about] + [_cell(metrics.get(name)) for name in names])
    return lines


def _cell(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "-"
    if metric.ci95 is None:
        return number_text(metric.value)
    low, high = (number_text(bound, 3, beside=metric.value) for bound in metric.ci95)
    return f"{number_text(metric.value)} [{low}, {high}]"


def _in_math(cell: str) -> str:
    """Return numbers of a cell as LaTeX sets them: a sign is no hyphen, and an exponent none of letters."""
    signed = re.sub(r"(?<![\w.])([+-])(?=\d)", r"$\1$", cell)
    return re.sub(r"(?<=\d)e([+-]\d+)", lambda found: f"$\\times 10^{{{int(found[1])}}}$", signed)


def _names(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(name for _, metrics in rows for name in metrics))


def _about(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(column for said, _ in rows for column in said))


def _shown(rows: Sequence[ResultRow]) -> list[str]:
    """Return the columns that tell the rows apart, or the adapter of a single one."""
    columns = ("run", "task", "adapter")
    several = [column for column in columns if len({said[column] for said, _ in rows}) > 1]
    return several or ["adapter"]

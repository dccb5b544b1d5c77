"""Tables of text: columns as wide as their widest cell."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

__all__ = ["NAME_WIDTH", "fitting_table", "text_table"]

NAME_WIDTH = 24  # of an adapter at the head of its column


def fitting_table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Text]:
    """Return the lines of `text_table`; where one would be wider, those of each row below its first cell, by name."""
    lines = text_table(heads, rows)
    if all(line.cell_len <= width for line in lines):
        return lines
    stacked = []
    for name, *cells in rows:
        stacked.append(Text(f"  {name}", style="bold"))
        line = ""
        for part in (f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell):
            if line and cell_len(f"    {line} · {part}") > width:
                stacked.append(Text(f"    {line}"))
                line = ""
            line = f"{line} · {part}" if line else part
        stacked.append(Text(f"    {line}"))
    return stacked


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Text]:
    """Return lines of columns, each as wide as its widest cell, without blanks at their ends."""
    widths = [max(cell_len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for line in [heads, *rows]:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        lines.append(Text(f"  {'  '.join(cells)}".rstrip(), style="bold" if line is heads else ""))
    return lines

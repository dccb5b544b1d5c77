"""Tables of text: columns as wide as their widest cell."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

__all__ = ["NAME_WIDTH", "text_table"]

NAME_WIDTH = 24  # of an adapter at the head of its column


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Text]:
    """Return lines of columns, each as wide as its widest cell, without blanks at their ends."""
    widths = [max(cell_len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for line in [heads, *rows]:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        lines.append(Text(f"  {'  '.join(cells)}".rstrip(), style="bold" if line is heads else ""))
    return lines

"""Tables of text: no line is wider than the terminal, and no cell is lost where there is no room side by side."""

import pytest

from petals_eval.report.tables import fitting_table, text_table

HEADS = ["", "reviews/prompts", "part-1/prompts", "difference", "95% interval", "p"]
ROWS = [
    ["accuracy", "0.9700", "0.9600", "+0.0100", "-0.020 to +0.040", "0.500"],
    ["F1 (macro)", "0.9699", "0.9598", "+0.0101", "", "0.504"],
]


def test_a_table_that_fits_stays_one() -> None:
    assert fitting_table(HEADS, ROWS, 100) == text_table(HEADS, ROWS)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_wide_table_has_a_paragraph_a_row(width: int) -> None:
    lines = [line.plain for line in fitting_table(HEADS, ROWS, width)]
    assert max(map(len, lines)) <= width
    assert [line for line in lines if not line.startswith("   ")] == ["  accuracy", "  F1 (macro)"]
    told = " · ".join(line.strip() for line in lines)
    for name, *cells in ROWS:
        for head, cell in zip(HEADS[1:], cells, strict=True):
            assert not cell or f"{head} {cell}" in told, (name, head)

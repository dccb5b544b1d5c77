"""What is wider than the terminal is folded or left out; in a pipe and a log nothing is."""

import io

import pytest
from rich.console import Console, Group

from petals_eval.bench.outcome import forward_header, inference_header
from petals_eval.cli.bench import Folding
from petals_eval.report import ProgressDisplay

COUNTS = [(9, 100, 1), (10_132, 21_808, 3), (1_234_567, 7_654_321, 128)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_progress_line_fits_the_terminal(width: int, counts: tuple[int, int, int]) -> None:
    done, total, servers = counts
    now = [0.0]
    display = ProgressDisplay(total, Terminal(), clock=lambda: now[0], every=1e9)
    display._console = console = Console(file=Terminal(), width=width, force_terminal=True, color_system=None)
    now[0] = 12.5
    display.update(done, retries=12_345, servers=servers)
    console.print(Group(display._draw()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1 and len(lines[0]) <= width
    assert f"{done:,}/{total:,}" in lines[0]
    assert ("━" in lines[0]) == (len(display.status()) + 21 <= width), "a bar where there is room for one"


def test_while_the_swarm_is_away_no_time_is_guessed() -> None:
    now = [0.0]
    display = ProgressDisplay(100, io.StringIO(), clock=lambda: now[0])
    now[0] = 10.0
    display.update(50, servers=2)
    assert "50/100 · 5 ex/s · 0:10 left" in display.status()
    display.waiting("waiting for the swarm: no server holds blocks 2:4")
    assert "ex/s · waiting · 0 retries" in display.status() and "left" not in display.status()


@pytest.mark.parametrize("head", [forward_header(), inference_header()])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_of_the_benchmark_is_folded_at_the_end_of_a_column(
    head: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    fold = Folding(Terminal())
    pairs = zip(head, f"{head[1:]} ", strict=True)
    row = "".join("9" if character != " " and following == " " else " " for character, following in pairs)
    folded = [fold(head), fold(row), fold("short")]
    assert all(len(line) <= width for lines in folded for line in lines)
    assert len(folded[0]) == len(folded[1]) == -(-len(head) // width) and folded[2] == ["short"]
    assert "".join("".join(folded[0]).split()) == "".join(head.split())
    assert "".join(folded[1]).count("9") == row.count("9")
    assert Folding(io.StringIO())(head) == [head]

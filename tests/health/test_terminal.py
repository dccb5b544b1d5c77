"""A report on the terminal. Whatever peers say, it stays text."""

import io
import re

from rich.console import Console

from petals_eval.health import HealthReport
from petals_eval.health.terminal import print_report
from tests.support.fake_health import (
    FakeServer,
    FakeSwarm,
    report_on,
)


def printed(report: HealthReport) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=100, markup=False, highlight=False))
    return stream.getvalue()


def test_the_terminal_shows_a_line_a_bar_and_every_server(report: HealthReport) -> None:
    text = printed(report)
    assert "tiny   degraded   4/4 blocks, thinnest: block 0 (2 servers)" in text
    assert "a canary all the way: 250 ms, 1,234 tok/s" in text
    assert "0 ████  2 to 2 servers a block" in text
    assert re.search(r"disagrees-with-replica  blocks \d:\d: 2 of 3 servers agree on another answer", text)
    assert "degraded: 2 models, 6 servers, asked up to level route" in text


def test_missing_blocks_stand_out_in_the_bar() -> None:
    text = printed(report_on(FakeSwarm(4, a=FakeServer(0, 2), b=FakeServer(3, 4))))
    assert "0 ██✗█" in text and "broken" in text and "no usable server holds blocks 2:3" in text


def test_nothing_a_peer_says_moves_the_cursor(report: HealthReport) -> None:
    text = printed(report)
    assert "\x1b" not in text and "\u202e" not in text
    assert not any(line.startswith("# HELP") for line in text.splitlines())

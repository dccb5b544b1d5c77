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


def printed(report: HealthReport, width: int = 100) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, markup=False, highlight=False))
    return stream.getvalue()


def test_the_terminal_shows_a_line_a_bar_and_every_server(report: HealthReport) -> None:
    text = printed(report)
    assert "tiny   degraded   4/4 blocks, thinnest: block 0 (2 servers)" in text
    assert "a canary all the way: 250 ms, 1,234 tok/s" in text
    assert "0 ████  2 to 2 servers a block" in text
    assert re.search(r"disagrees-with-replica  blocks \d:\d: 2 of 3 servers agree on another answer", text)
    assert "degraded: 2 models, 6 servers, asked up to level route" in text
    assert "answers compared with another server's or with blocks at home: blocks 0:4; with nobody's: none" in text
    assert "the servers' own pings: median 206 ms, longest 400 ms, 1 of 3 without an answer" in text
    assert "bootstrap peer /ip4/203.0.113.6/tcp/1/p2p/a: <script>" in text and "203.0.113.5" not in text


def test_what_was_not_compared_is_named() -> None:
    alone = printed(report_on(FakeSwarm(4, a=FakeServer(0, 4), b=FakeServer(0, 2))))
    assert "blocks at home: blocks 0:2; with nobody's: 2:4" in alone
    assert "no answer was compared" in printed(report_on(FakeSwarm(4, a=FakeServer(0, 4))))
    assert "nothing was compared" in printed(report_on(FakeSwarm(4, a=FakeServer(0, 4)), level="info"))


def test_missing_blocks_stand_out_in_the_bar() -> None:
    text = printed(report_on(FakeSwarm(4, a=FakeServer(0, 2), b=FakeServer(3, 4))))
    assert "0 ██✗█" in text and "broken" in text and "no usable server holds blocks 2:3" in text


def test_the_table_fits_the_terminal() -> None:
    servers = {
        "a" * 40: FakeServer(0, 4, record={"public_name": "somebody", "quant_type": "nf4"}),
        "b": FakeServer(0, 4),
    }
    report = report_on(FakeSwarm(4, **servers))
    narrow = printed(report, 80)
    table = [line for line in narrow.splitlines() if "healthy" in line and "0:4" in line]
    assert len(table) == 2 and max(map(len, table)) <= 80
    assert "not shown in 80 columns: claims, cache left, announced" in narrow
    assert "not shown" not in printed(report, 200) and "announced" in printed(report, 200)


def test_nothing_a_peer_says_moves_the_cursor(report: HealthReport) -> None:
    text = printed(report)
    assert "\x1b" not in text and "\u202e" not in text
    assert not any(line.startswith("# HELP") for line in text.splitlines())

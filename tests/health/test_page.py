"""A report as an HTML page. Whatever peers say, it stays text."""

import re
from html.parser import HTMLParser

from petals_eval.health import HealthReport, Verdict
from petals_eval.health.history import Uptime
from petals_eval.health.page import page
from tests.support.fake_health import EVIL, FakeServer, FakeSwarm, report_on


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_says_only_what_it_means_to(report: HealthReport) -> None:
    uptime = Uptime(10, 90.0, (1.0, 0.5, 1.0, 0.999), (None, *[Verdict.HEALTHY] * 46, Verdict.BROKEN))
    text = page(report, {"tiny": uptime}, error=EVIL, reload=60)
    parser = _Tags()
    parser.feed(text)
    assert parser.open == []
    names = {name for name, _ in parser.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(key in attributes for _, attributes in parser.tags for key in ("src", "href", "onclick", "onerror"))
    assert "\x1b" not in text and "\u202e" not in text and "<script" not in text
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    assert "lowest 50% (block 1)" in text and "99.9%" in text
    assert "disagrees-with-replica" in text


def test_the_page_has_what_records_say_of_throughput_and_of_pings(report: HealthReport) -> None:
    text = page(report)
    assert "link 900 · forward 5,000 · sessions 200" in text and "link 100</small>" in text
    matrix = re.findall(r"<td[^>]*>(✕|\d+ ms|)</td>", text[text.index('class="pings"') :].split("</table>")[0])
    assert matrix == ["", "", "", "✕", "", "12 ms", "", "", ""]  # bad, a, b; whoever is no server of it has no column
    assert "Median 206 ms" not in text and "The servers&#39; own pings: median 206 ms" in text


def test_the_page_says_what_was_compared_and_who_answers(report: HealthReport) -> None:
    text = page(report)
    assert (
        "Answers compared with another server&#39;s or with blocks at home: blocks 0:4; with nobody&#39;s: none."
        in text
    )
    assert "1 of 2 addresses of bootstrap peers can be reached." in text and "203.0.113.6" in text
    assert "One look: it says nothing of before or after." in text
    assert "Looked 3 times in 11 min." in page(report, looks=3, seconds=660.0)
    lonely = page(report_on(FakeSwarm(4, a=FakeServer(0, 4))))
    assert "No answer was compared with another server&#39;s." in lonely and "Pings" not in lonely


def test_a_matrix_of_many_servers_is_cut() -> None:
    names = [f"s{index}" for index in range(60)]
    servers = {name: FakeServer(0, 4, record={"next_pings": dict.fromkeys(names, 0.1)}) for name in names}
    matrix = page(report_on(FakeSwarm(4, **servers))).split('class="pings"')[1].split("</table>")[0]
    assert matrix.count("<tr>") == 25 and matrix.count("100 ms") == 24 * 24


def test_a_page_before_the_first_look() -> None:
    assert "under way" in page(None) and "unknown" in page(None)

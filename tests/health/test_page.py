"""A report as an HTML page. Whatever peers say, it stays text."""

from html.parser import HTMLParser

from petals_eval.health import HealthReport, Verdict
from petals_eval.health.history import Uptime
from petals_eval.health.page import page
from tests.support.fake_health import EVIL


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
    uptime = Uptime(10, (1.0, 0.5, 1.0, 0.999), (None, *[Verdict.HEALTHY] * 46, Verdict.BROKEN))
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


def test_a_page_before_the_first_look() -> None:
    assert "under way" in page(None) and "unknown" in page(None)

"""A report as one HTML page: no scripts, no external resources, for desktop and phone, light and dark.

Every word passes one gate on its way into the page, in content and in attributes alike: it is made printable, cut and
escaped. What a peer says stays text.
"""

import time
from collections.abc import Mapping

from petals_eval.health.findings import FINDINGS
from petals_eval.health.history import Uptime
from petals_eval.health.results import HealthReport, ModelHealth, ServerHealth, Verdict
from petals_eval.health.terminal import (
    bootstrap_text,
    comparison_text,
    coverage_text,
    megabytes,
    ping_text,
    seconds_text,
)
from petals_eval.pages import page_environment
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import number_text, plural, printable

__all__ = ["page"]

_MARKS = {Verdict.HEALTHY: "✓", Verdict.DEGRADED: "!", Verdict.UNKNOWN: "?", Verdict.BROKEN: "✕"}
_MAX_ROWS = 500  # servers, and findings, of one model: a page of more is not read
_MAX_PINGING = 24  # servers in the matrix of pings: a wider one is not read
_MIN_RELOAD_SECONDS = 5


def page(
    report: HealthReport | None,
    uptimes: Mapping[str, Uptime] | None = None,
    *,
    error: str | None = None,
    reload: float | None = None,
    looks: int = 1,
    seconds: float = 0.0,
) -> str:
    """Return the whole page.

    report: None before the first look. uptimes: by model, where there is a history. error: why the last look did not
    reach the swarm. reload: seconds after which a browser asks again. looks, seconds: how many looks there were, and in
    what time.
    """
    models = () if report is None else report.models
    names = {found.name for model in models for _, found in model.all_findings}
    return _TEMPLATE.render(
        report=report,
        verdict=Verdict.UNKNOWN if report is None or error is not None else report.verdict,
        uptimes=uptimes or {},
        error=error,
        reload_seconds=None if reload is None else max(_MIN_RELOAD_SECONDS, round(reload)),
        moment="" if report is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.time)),
        num_servers=sum(len(model.servers) for model in models),
        megabytes=0.0 if report is None else megabytes(report.traffic),
        found_names=sorted(names & FINDINGS.keys()),
        looks=looks,
        seconds=seconds,
    )


def _ping_rows(model: ModelHealth) -> list[tuple[ServerHealth, list[str]]]:
    """Return the matrix of the servers' own pings: who pings, and the text of each cell in the order of the rows.

    Servers that neither ping nor are pinged are left out, and those beyond `_MAX_PINGING`.
    """
    pinged = {peer_id for server in model.servers for peer_id in server.next_pings or ()}
    shown = [server for server in model.servers if server.next_pings or server.peer_id in pinged][:_MAX_PINGING]
    return [(server, [_ping_cell(server.next_pings or {}, other.peer_id) for other in shown]) for server in shown]


def _ping_cell(pings: Mapping[str, float | None], peer_id: str) -> str:
    if peer_id not in pings:
        return ""
    seconds = pings[peer_id]
    return "✕" if seconds is None else seconds_text(seconds)


def _percent(share: float) -> str:
    """Round down: 99.99% is not 100."""
    return f"{int(share * 1000) / 10:g}%"


_ENVIRONMENT = page_environment("petals_eval.health")
_ENVIRONMENT.filters["cut"] = lambda text, longest: printable(text, longest=longest)
_ENVIRONMENT.filters["sentence"] = lambda text: f"{text[:1].upper()}{text[1:]}."
_ENVIRONMENT.globals.update(
    marks=_MARKS,
    meanings=FINDINGS,
    max_rows=_MAX_ROWS,
    plural=plural,
    percent=_percent,
    seconds_text=seconds_text,
    coverage_text=coverage_text,
    comparison_text=comparison_text,
    bootstrap_text=bootstrap_text,
    ping_rows=_ping_rows,
    max_pinging=_MAX_PINGING,
    ping_text=ping_text,
    number_text=number_text,
    short_peer=short_peer,
)
_TEMPLATE = _ENVIRONMENT.get_template("page.html")

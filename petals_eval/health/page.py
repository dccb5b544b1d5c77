"""A report as one HTML page: no scripts, no external resources, for desktop and phone, light and dark.

Every word that came from a peer goes through `_text`, in content and in attributes alike.
"""

import html
import time
from collections.abc import Iterable, Mapping

from petals_eval.health.findings import FINDINGS
from petals_eval.health.history import Uptime
from petals_eval.health.results import Finding, HealthReport, ModelHealth, ServerHealth, Verdict
from petals_eval.health.style import STYLE
from petals_eval.health.terminal import coverage_text, seconds_text
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import printable

__all__ = ["page"]

_MARKS = {Verdict.HEALTHY: "✓", Verdict.DEGRADED: "!", Verdict.UNKNOWN: "?", Verdict.BROKEN: "✕"}
_MOST_SERVERS = 500  # of one model: a page of more is not read


def page(
    report: HealthReport | None,
    uptimes: Mapping[str, Uptime] | None = None,
    *,
    error: str | None = None,
    reload: float | None = None,
) -> str:
    """The whole page.

    report: None before the first look. uptimes: by model, where there is a history. error: why the last look did not
    reach the swarm. reload: seconds after which a browser asks again.
    """
    verdict = Verdict.UNKNOWN if report is None or error is not None else report.verdict
    refresh = "" if reload is None else f'<meta http-equiv="refresh" content="{max(5, round(reload))}">'
    body = [_header(report, verdict)]
    if error is not None:
        body.append(f'<p class="alert">The last look did not reach the swarm. {_text(error)}</p>')
    if report is None:
        body.append("<p>The first look is under way.</p>")
    else:
        body += [f'<p class="note">{_text(note)}</p>' for note in report.notes]
        body += [_model(model, (uptimes or {}).get(model.name)) for model in report.models]
        body.append(_legend(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{refresh}'
        f"<title>{verdict.value}: swarm health</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _text(value: object, longest: int = 300) -> str:
    return html.escape(printable(str(value), longest=longest), quote=True)


def _verdict(verdict: Verdict) -> str:
    mark = f'<span aria-hidden="true">{_MARKS[verdict]}</span>'
    return f'<span class="verdict {verdict.value}">{mark} {verdict.value}</span>'


def _header(report: HealthReport | None, verdict: Verdict) -> str:
    line = ""
    if report is not None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.time))
        servers = sum(len(model.servers) for model in report.models)
        megabytes = (report.traffic.bytes_sent + report.traffic.bytes_received) / 1e6
        line = (
            f"<p>{moment} · {_count(len(report.models), 'model')} · {_count(servers, 'server')} · asked up to level "
            f"<b>{report.level.text}</b> in {report.seconds:.1f} s, {megabytes:.1f} MB</p>"
        )
    return f"<header><h1>Swarm health {_verdict(verdict)}</h1>{line}</header>"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _model(model: ModelHealth, uptime: Uptime | None) -> str:
    thinnest = model.thinnest
    figures = [
        ("Blocks covered", f"{model.covered} of {model.num_blocks}"),
        ("Thinnest block", "-" if thinnest is None else f"{thinnest[0]} ({_count(thinnest[1], 'server')})"),
        ("Servers that answer", f"{sum(each.seen == 'answers' for each in model.servers)} of {len(model.servers)}"),
        ("Whole route", {True: "yes", False: "no", None: "not asked"}[model.has_route]),
        ("Canary all the way", seconds_text(model.route_seconds)),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in figures)
    why = "" if model.verdict is Verdict.HEALTHY else f'<p class="why">{_text(model.why)}</p>'
    return (
        f'<section><h2><span class="name">{_text(model.name, 120)}</span> {_verdict(model.verdict)}</h2>{why}'
        f"<dl>{cells}</dl>{_coverage(model, uptime)}{_timeline(uptime)}{_findings(model)}{_servers(model)}</section>"
    )


def _coverage(model: ModelHealth, uptime: Uptime | None) -> str:
    """A column a block: as high as it has servers; below it, how much of the last day it had one."""
    if not model.replicas:
        return ""
    most = max(*model.replicas, 1)
    held = uptime.blocks if uptime and len(uptime.blocks) == model.num_blocks else ()
    columns = []
    for block, count in enumerate(model.replicas):
        up = f", {_percent(held[block])} of the last day" if held else ""
        kind = "none" if count == 0 else "one" if count == 1 else "some"
        day = f'<i class="day" style="opacity:{0.15 + 0.85 * held[block]:.2f}"></i>' if held else ""
        columns.append(
            f'<li title="block {block}: {_count(count, "server")}{up}">'
            f'<i class="bar {kind}" style="height:{max(6, round(100 * count / most))}%"></i>{day}</li>'
        )
    worst = ""
    if held:
        lowest = min(held)
        worst = f" · below: uptime over the last day, lowest {_percent(lowest)} (block {held.index(lowest)})"
    classes = "coverage" + " dense" * (model.num_blocks > 48) + " days" * bool(held)
    width = max(420, 64 * model.num_blocks)
    label = html.escape(coverage_text(model), quote=True)
    return (
        f'<figure style="max-width:{width}px"><ol class="{classes}" role="img" aria-label="{label}">'
        f"{''.join(columns)}</ol>"
        f'<figcaption><span>block 0</span><span class="middle">servers a block, at most {most}{worst}</span>'
        f"<span>{model.num_blocks - 1}</span></figcaption></figure>"
    )


def _percent(share: float) -> str:
    """Rounded down: 99.99% is not 100."""
    return f"{int(share * 1000) / 10:g}%"


def _timeline(uptime: Uptime | None) -> str:
    if uptime is None or not any(uptime.slots):
        return ""
    cells = "".join(
        f'<li class="{slot.value if slot else "nothing"}" title="{(len(uptime.slots) - index) / 2:g} h ago: '
        f'{slot.value if slot else "nobody looked"}"></li>'
        for index, slot in enumerate(uptime.slots)
    )
    looks = _count(uptime.looks, "look")
    return (
        f'<figure><ol class="timeline" role="img" aria-label="verdicts of the last day">{cells}</ol><figcaption>'
        f'<span>24 h ago</span><span class="middle">worst verdict of each half hour, {looks}</span>'
        "<span>now</span></figcaption></figure>"
    )


def _findings(model: ModelHealth) -> str:
    if not model.all_findings:
        return '<p class="clean">Nothing was found.</p>' if model.verdict is Verdict.HEALTHY else ""
    items = "".join(f"<li>{_finding(server, found)}</li>" for server, found in model.all_findings[:_MOST_SERVERS])
    return f'<h3>Findings</h3><ul class="findings">{items}</ul>'


def _finding(server: ServerHealth | None, found: Finding) -> str:
    where = "" if server is None else f"<code>{_text(short_peer(server.peer_id))}</code> {server.start}:{server.end} "
    meaning = html.escape(FINDINGS[found.name].meaning, quote=True) if found.name in FINDINGS else ""
    return (
        f'<b class="{found.implies.value}" title="{meaning}">{_text(found.name)}</b> {where}'
        f"<span>{_text(found.detail)}</span>"
    )


_COLUMNS = (
    "Server",
    "Blocks",
    "Verdict",
    "Petals",
    "Dtype",
    "Round trip",
    "Claims",
    "Canary",
    "Cache left",
    "Announced",
)


def _servers(model: ModelHealth) -> str:
    if not model.servers:
        return ""
    shown = model.servers[:_MOST_SERVERS]
    rest = len(model.servers) - len(shown)
    more = f'<p class="note">and {_count(rest, "more server")}: /api/v1/state and --json have all</p>' if rest else ""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_row(server) for server in shown)
    return f"<h3>Servers</h3><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _row(server: ServerHealth) -> str:
    name = f"<small>{_text(server.public_name, 40)}</small>" if server.public_name else ""
    dtype = server.dtype_seen or server.dtype or "?"
    quant = "" if server.quant_type in (None, "none") else f" {server.quant_type}"
    cells: Iterable[str] = (
        f'<code title="{_text(server.peer_id)}">{_text(short_peer(server.peer_id))}</code>{name}',
        f"{server.start}:{server.end}",
        _verdict(server.verdict) + (" <small>relay</small>" if server.using_relay else ""),
        _text(server.version_seen or server.version or "?", 16),
        _text(f"{dtype}{quant}", 24),
        seconds_text(server.round_trip),
        f"{server.throughput:,.0f} tok/s",
        "-" if server.tokens_per_second is None else f"{server.tokens_per_second:,.0f} tok/s",
        "-" if server.cache_tokens_left is None else f"{server.cache_tokens_left:,}",
        "-" if server.record_age is None else f"{max(0.0, server.record_age):.0f} s ago",
    )
    tds = "".join(f'<td data-name="{column}">{cell}</td>' for column, cell in zip(_COLUMNS, cells, strict=True))
    return f"<tr>{tds}</tr>"


def _legend(report: HealthReport) -> str:
    names = sorted({found.name for model in report.models for _, found in model.all_findings if found.name in FINDINGS})
    meanings = "".join(f"<li><b>{name}</b> {html.escape(FINDINGS[name].meaning)}</li>" for name in names)
    listed = f"<ul>{meanings}</ul>" if names else ""
    return (
        f"<footer>{listed}<p>Healthy: every server computed a canary, finite, twice alike, and as other servers of the "
        "same blocks. A record or an answer to rpc_info alone is unknown at best. “Canary” is one small call: mostly "
        "its round trip.</p></footer>"
    )

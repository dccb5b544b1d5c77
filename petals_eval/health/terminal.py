"""A report on the terminal: a line and a bar for each model, a line for each server."""

from collections.abc import Mapping
from statistics import median

from rich.console import Console
from rich.text import Text

from petals_eval.health.results import Finding, HealthReport, ModelHealth, ServerHealth, Traffic, Verdict
from petals_eval.health.settings import Level
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.swarm.wire.span import Span, joined, spans_text
from petals_eval.text import number_text, plural, printable

__all__ = [
    "bootstrap_text",
    "comparison_text",
    "coverage_text",
    "megabytes",
    "ping_text",
    "print_report",
    "route_text",
    "seconds_text",
    "summary_text",
]

_COLOURS = {Verdict.HEALTHY: "green", Verdict.DEGRADED: "yellow", Verdict.UNKNOWN: "magenta", Verdict.BROKEN: "red"}
_BARS = "▁▂▃▄▅▆▇█"
_MAX_SERVERS = 200  # lines of one model; --json and --html have all
_HEADINGS = ("server", "blocks", "verdict", "petals", "dtype", "trip", "claims", "canary", "cache left", "announced")
_TO_THE_RIGHT = frozenset(_HEADINGS[5:])  # numbers
_LEFT_OUT_FIRST = ("announced", "cache left", "claims", "petals")  # where the terminal is too narrow for all columns


def print_report(report: HealthReport, console: Console) -> None:
    """Show a report. Strangers' words have been made printable on their way into it, and are once more here."""
    for model in report.models:
        for line in (_head(model), *_bar(model, console.width), *_servers(model, console.width), Text("")):
            console.print(line, soft_wrap=True)
    for peer in report.bootstrap:
        if peer.state == "unreachable":
            console.print(f"bootstrap peer {peer.address}: {printable(peer.detail or '')}", soft_wrap=True)
    console.print(summary_text(report), soft_wrap=True)


def summary_text(report: HealthReport) -> str:
    """Return the verdict on the swarm with what was asked and what it cost, and the notes."""
    count = sum(len(model.servers) for model in report.models)
    text = (
        f"{report.verdict.value}: {plural(len(report.models), 'model')}, {plural(count, 'server')}, "
        f"asked up to level {report.level.text} in {report.seconds:.1f} s "
        f"({plural(report.traffic.calls, 'call')}, {megabytes(report.traffic):.1f} MB)"
    )
    return "\n".join([text, *(f"note: {printable(note)}" for note in report.notes)])


def megabytes(traffic: Traffic) -> float:
    """Return the megabytes of all messages, in both directions."""
    return (traffic.bytes_sent + traffic.bytes_received) / 1e6


def _head(model: ModelHealth) -> Text:
    line = Text(printable(model.name, longest=80), style="bold")
    line.append("   ")
    line.append(model.verdict.value, style=f"bold {_COLOURS[model.verdict]}")
    line.append(f"   {coverage_text(model)}", style="not bold")
    if model.verdict is not Verdict.HEALTHY:
        line.append(f"\n  {printable(model.why)}", style="not bold")
    if model.servers:
        line.append(f"\n  {comparison_text(model)}", style="not bold")
    if model.route_seconds is not None:
        line.append(f"\n  {route_text(model)}", style="not bold")
    pings = ping_text(model)
    if pings is not None:
        line.append(f"\n  {pings}", style="not bold")
    for finding in model.findings:
        if finding.detail != model.why:
            line.append("\n  ").append_text(_finding(finding))
    return line


def coverage_text(model: ModelHealth) -> str:
    """Return how many blocks have a server, and which has the fewest."""
    text = f"{model.covered}/{model.num_blocks}{' or more' if model.may_have_more_blocks else ''} blocks"
    thinnest = model.thinnest
    if thinnest is not None:
        text += f", thinnest: block {thinnest[0]} ({plural(thinnest[1], 'server')})"
    return text


def route_text(model: ModelHealth) -> str:
    """Return how quick a canary went through all blocks."""
    speed = model.route_tokens_per_second or 0
    return f"a canary all the way: {seconds_text(model.route_seconds)}, {speed:,.0f} tok/s one call after the other"


def seconds_text(seconds: float | None) -> str:
    """Return a time for a person to read.

    >>> [seconds_text(each) for each in (None, 0.0123, 2.5, 20, 660, 18_000, 172_800, 1.7e308)]
    ['-', '12 ms', '2.5 s', '20 s', '11 min', '5 h', '2 days', '2e+303 days']
    """
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{number_text(seconds / 86_400, 0)} days"


def comparison_text(model: ModelHealth) -> str:
    """Return which blocks' answers were held against others, and which were not: two wrong servers may agree, one alone
    contradicts nobody."""
    if model.level < Level.FORWARD:
        return f"nothing was compared: no server was asked to compute (level {model.level.text})"
    compared = [Span(*each) for each in model.compared]
    alone = joined(block for block in range(model.num_blocks) if not any(block in span for span in compared))
    if not compared:
        return "no answer was compared with another server's"
    text = f"answers compared with another server's or with blocks at home: blocks {spans_text(compared)}"
    return f"{text}; with nobody's: {spans_text(alone) or 'none'}"


def ping_text(model: ModelHealth) -> str | None:
    """Return how far the servers are from each other by their own word; None where they do not say."""
    pings = [seconds for server in model.servers for seconds in (server.next_pings or {}).values()]
    answered = sorted(seconds for seconds in pings if seconds is not None)
    if not answered:
        return None
    text = f"the servers' own pings: median {seconds_text(median(answered))}, longest {seconds_text(answered[-1])}"
    lost = len(pings) - len(answered)
    return f"{text}, {lost} of {len(pings)} without an answer" if lost else text


def bootstrap_text(report: HealthReport) -> str:
    """Return how many addresses of bootstrap peers can be reached."""
    asked = [each for each in report.bootstrap if each.state != "not asked"]
    if not asked:
        return "bootstrap peers were not asked one by one"
    reachable = sum(each.state == "reachable" for each in asked)
    return f"{reachable} of {plural(len(asked), 'address', 'addresses')} of bootstrap peers can be reached"


def _bar(model: ModelHealth, width: int) -> list[Text]:
    """Return lines with a character a block, as high as it has servers; ✗ where it has none."""
    if not model.replicas:
        return []
    most = max(*model.replicas, 1)
    digits = len(str(model.num_blocks))
    length = max(16, (width - digits - 30) // 16 * 16)
    lines = []
    for start in range(0, model.num_blocks, length):
        line = Text(f"  {start:>{digits}} ")
        for count in model.replicas[start : start + length]:
            height = _BARS[max(0, round(count / most * len(_BARS)) - 1)] if count else "✗"
            line.append(height, style="green" if count > 1 else "yellow" if count else "bold red")
        lines.append(line)
    lines[-1].append(f"  {min(model.replicas)} to {plural(max(model.replicas), 'server')} a block", style="dim")
    return lines


def _servers(model: ModelHealth, width: int) -> list[Text]:
    shown = model.servers[:_MAX_SERVERS]
    if not shown:
        return []
    rows = [dict(zip(_HEADINGS, _row(server), strict=True)) for server in shown]
    widths = {heading: max(len(heading), *(len(row[heading]) for row in rows)) for heading in _HEADINGS}
    for heading in _LEFT_OUT_FIRST:
        if sum(widths.values()) + 2 * len(widths) > width:
            del widths[heading]
    lines = [Text(f"  {_aligned({heading: heading for heading in widths}, widths)}", style="dim")]
    for server, row in zip(shown, rows, strict=True):
        line = Text(f"  {_aligned(row, widths)}")
        verdict = 2 + widths["server"] + widths["blocks"] + 4
        line.stylize(_COLOURS[server.verdict], verdict, verdict + len(server.verdict.value))
        lines.append(line)
        lines += [Text("      ").append_text(_finding(each)) for each in server.findings]
    if len(model.servers) > len(shown):
        lines.append(Text(f"  and {len(model.servers) - len(shown)} more: --json and --html show all"))
    missing = [heading for heading in _HEADINGS if heading not in widths]
    if missing:
        lines.append(Text(f"  not shown in {width} columns: {', '.join(missing)}", style="dim"))
    return lines


def _aligned(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    """Return a line with a cell for each column that has a width. Both by the columns' headings."""
    padded = (
        cells[heading].rjust(width) if heading in _TO_THE_RIGHT else cells[heading].ljust(width)
        for heading, width in widths.items()
    )
    return "  ".join(padded)


def _row(server: ServerHealth) -> tuple[str, ...]:
    dtype = server.dtype_seen or server.dtype or "?"
    quant = server.quant_type
    name = f" {printable(server.public_name, longest=24)}" if server.public_name else ""
    return (
        f"{short_peer(server.peer_id)}{name}",
        str(server.span),
        server.verdict.value,
        printable(server.version_seen or server.version or "?", longest=16),
        printable(dtype if quant in (None, "none") else f"{dtype} {quant}", longest=20),
        seconds_text(server.round_trip),
        f"{number_text(server.throughput, 0)} tok/s",
        "-" if server.tokens_per_second is None else f"{server.tokens_per_second:,.0f} tok/s",
        "-" if server.cache_tokens_left is None else f"{server.cache_tokens_left:,}",
        "-" if server.record_age is None else f"{number_text(max(0.0, server.record_age), 0)} s ago",
    )


def _finding(finding: Finding) -> Text:
    line = Text(finding.name, style=_COLOURS[finding.implies])
    line.append(f"  {printable(finding.detail, longest=300)}", style="none")
    if finding.level is not Level.RECORD:
        line.append(f" ({finding.level.text})", style="dim")
    return line

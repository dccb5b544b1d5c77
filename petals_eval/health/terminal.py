"""A report on the terminal: a line and a bar for each model, a line for each server."""

from rich.console import Console
from rich.text import Text

from petals_eval.health.results import Finding, HealthReport, ModelHealth, ServerHealth, Traffic, Verdict
from petals_eval.health.settings import Level
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import plural, printable

__all__ = ["coverage_text", "megabytes", "print_report", "route_text", "seconds_text", "summary_text"]

_COLOURS = {Verdict.HEALTHY: "green", Verdict.DEGRADED: "yellow", Verdict.UNKNOWN: "magenta", Verdict.BROKEN: "red"}
_BARS = "▁▂▃▄▅▆▇█"
_MAX_SERVERS = 200  # lines of one model; --json and --html have all
_HEADINGS = ("server", "blocks", "verdict", "petals", "dtype", "trip", "claims", "canary", "cache left", "announced")
_FIRST_RIGHT_COLUMN = 5  # from here on columns are set to the right


def print_report(report: HealthReport, console: Console) -> None:
    """Show a report. Strangers' words have been made printable on their way into it, and are once more here."""
    for model in report.models:
        for line in (_head(model), *_bar(model, console.width), *_servers(model), Text("")):
            console.print(line, soft_wrap=True)
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
    if model.route_seconds is not None:
        line.append(f"\n  {route_text(model)}", style="not bold")
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

    >>> seconds_text(None), seconds_text(0.0123), seconds_text(2.5)
    ('-', '12 ms', '2.5 s')
    """
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


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


def _servers(model: ModelHealth) -> list[Text]:
    shown = model.servers[:_MAX_SERVERS]
    if not shown:
        return []
    rows = [_HEADINGS, *(_row(server) for server in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [Text(f"  {_aligned(_HEADINGS, widths)}", style="dim")]
    for server, row in zip(shown, rows[1:], strict=True):
        line = Text(f"  {_aligned(row, widths)}")
        verdict = 2 + sum(widths[:2]) + 4
        line.stylize(_COLOURS[server.verdict], verdict, verdict + len(server.verdict.value))
        lines.append(line)
        lines += [Text("      ").append_text(_finding(each)) for each in server.findings]
    if len(model.servers) > len(shown):
        lines.append(Text(f"  and {len(model.servers) - len(shown)} more: --json and --html show all"))
    return lines


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (
        cell.rjust(width) if column >= _FIRST_RIGHT_COLUMN else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
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
        f"{server.throughput:,.0f} tok/s",
        "-" if server.tokens_per_second is None else f"{server.tokens_per_second:,.0f} tok/s",
        "-" if server.cache_tokens_left is None else f"{server.cache_tokens_left:,}",
        "-" if server.record_age is None else f"{max(0.0, server.record_age):.0f} s ago",
    )


def _finding(finding: Finding) -> Text:
    line = Text(finding.name, style=_COLOURS[finding.implies])
    line.append(f"  {printable(finding.detail, longest=300)}", style="none")
    if finding.level is not Level.RECORD:
        line.append(f" ({finding.level.text})", style="dim")
    return line

"""`petals-eval health`: is a swarm fit for work now?"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from petals_eval.health import HealthReport, HealthSettings
    from petals_eval.health.locked import LockedServers

__all__ = ["HELP", "SHORT", "health"]

SHORT = "Ask a swarm's servers whether they do what they say."
HELP = """Ask every server of a swarm whether it does what its record says, and say whether the swarm is fit for work.

\b
Levels, each with those before it:
  record   what the DHT says; a claim, so the verdict is unknown at best
  info     does each server answer, and say what its record says? unknown at best
  forward  do its blocks compute: finite, the same twice, the same as other servers?
  route    and does a canary of random hidden states get all the way? (default)

\b
Look once (exit code 0 healthy, 1 degraded, 2 a wrong flag, 3 broken, unknown or unreachable):
  petals-eval health --initial-peers /ip4/...
For other programs, and as a page:
  petals-eval health --initial-peers /ip4/... --json --html health.html
Go on looking, and show what changes:
  petals-eval health --initial-peers /ip4/... --watch --every 30
Page, /api/v1/state, /metrics for Prometheus and /healthz, on this machine alone:
  petals-eval health --initial-peers /ip4/... --serve :9090 --history health.sqlite
"""
STRANGERS = "note: on the public swarm the canaries are work for strangers' machines: do not look too often."


def _option(group: str, metavar: str | None, help: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=group, show_default=False)


# Flags that are not fields of HealthSettings under the same name.
_OWN = ("public_swarm", "json_output", "html", "watch", "serve", "every", "history", "dht_prefix")
SWARM, PROBES, BUDGET, OUTPUT = "Swarm", "Probes", "Budget", "Output"


def health(
    initial_peers: Annotated[list[str] | None, _option(SWARM, "MADDR...", "Multiaddresses of bootstrap peers.")] = None,
    public_swarm: Annotated[
        bool | None, _option(SWARM, None, "The public Petals swarm: strangers' machines.", "--public-swarm")
    ] = None,
    dht_prefix: Annotated[
        list[str] | None,
        _option(SWARM, "NAME", "A model to look at; several times for several. Default: all announced."),
    ] = None,
    num_blocks: Annotated[int | None, _option(SWARM, "N", "Of these models. Default: as announced.")] = None,
    level: Annotated[str | None, _option(PROBES, "LEVEL", "record, info, forward or route. Default: route.")] = None,
    active_adapter: Annotated[
        str | None, _option(PROBES, "NAME", "LoRA adapter that every server should have.")
    ] = None,
    model: Annotated[
        str | None, _option(PROBES, "NAME", "Hub name or folder of the weights for --verify-local.")
    ] = None,
    verify_local: Annotated[
        str | None,
        _option(PROBES, "FIRST:LAST", "Load these blocks here, and hold their servers against them."),
    ] = None,
    min_replicas: Annotated[int | None, _option(PROBES, "N", "Servers each block should have. Default: 1.")] = None,
    announce_period: Annotated[
        float | None, _option(PROBES, "SECONDS", "Between a server's announcements. Default: 120, as Petals'.")
    ] = None,
    hidden_size: Annotated[int | None, _option(PROBES, "N", "Of the canary. Default: as the servers say.")] = None,
    canary_positions: Annotated[int | None, _option(BUDGET, "N", "Of a row of the canary. Default: 16.")] = None,
    concurrency: Annotated[int | None, _option(BUDGET, "N", "Servers asked at once. Default: 64.")] = None,
    time_limit: Annotated[
        float | None, _option(BUDGET, "SECONDS", "For a whole look; what is not asked by then is unknown. Default: 60.")
    ] = None,
    connect_timeout: Annotated[
        float | None, _option(BUDGET, "SECONDS", "For a server's first answer. Default: 10.")
    ] = None,
    call_timeout: Annotated[float | None, _option(BUDGET, "SECONDS", "For one canary. Default: 30.")] = None,
    json_output: Annotated[bool, _option(OUTPUT, None, "Print the report as JSON alone on stdout.", "--json")] = False,
    html: Annotated[Path | None, _option(OUTPUT, "FILE", "Write the report as one HTML page.")] = None,
    watch: Annotated[bool, _option(OUTPUT, None, "Look again and again; show what changes.", "--watch")] = False,
    serve: Annotated[
        str | None, _option(OUTPUT, "[HOST]:PORT", "Serve the page and metrics. Without a host: on this machine alone.")
    ] = None,
    every: Annotated[
        float, _option(OUTPUT, "SECONDS", "Between two looks of --watch and --serve. Default: 60.")
    ] = 60.0,
    history: Annotated[Path | None, _option(OUTPUT, "FILE", "SQLite file of --serve. Default: in memory.")] = None,
) -> int:
    flags = {name: value for name, value in locals().items() if name not in _OWN and value not in (None, [])}
    from petals_eval.config import PUBLIC_SWARM
    from petals_eval.errors import ConfigError
    from petals_eval.health import HealthSettings

    if bool(initial_peers) == bool(public_swarm):
        raise ConfigError("expected exactly one swarm: --initial-peers MADDR or --public-swarm")
    if serve is not None and (watch or json_output or html is not None):
        raise ConfigError(
            "--serve shows the report on its page and under /api/v1/state: leave --watch, --json, --html out"
        )
    if history is not None and serve is None:
        raise ConfigError("--history is kept by --serve: add --serve :9090, or leave it out")
    if not every > 0:
        raise ConfigError(f"--every: expected seconds above 0, found {every:g}")
    flags["initial_peers"] = initial_peers or PUBLIC_SWARM
    settings = HealthSettings(**flags, models=tuple(dht_prefix or ()))
    if public_swarm:
        typer.echo(STRANGERS, err=True)
    if serve is not None:
        from petals_eval.health.serving import serve_health

        return serve_health(settings, serve, every, history, say=lambda line: typer.echo(line, err=True))
    if watch:
        return _watch(settings, every, json_output, html)
    report = _look(settings)
    _show(report, json_output, html)
    return report.exit_code


def _look(settings: "HealthSettings", locked: "LockedServers | None" = None) -> "HealthReport":
    from petals_eval.health.check import check

    return check(settings, locked)


def _show(report: "HealthReport", json_output: bool, html: Path | None) -> None:
    from petals_eval.health.terminal import print_report
    from petals_eval.text import console_for

    if html is not None:
        _write_page(report, html)
    if json_output:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print_report(report, console_for(sys.stdout))


def _watch(settings: "HealthSettings", every: float, json_output: bool, html: Path | None) -> int:
    """Look until Ctrl-C. The first look in full, then what changed; with --json a line each, in full."""
    from petals_eval.errors import SwarmError
    from petals_eval.health.changes import changes
    from petals_eval.health.locked import LockedServers

    locked = LockedServers()
    last: HealthReport | None = None
    code = 3
    try:
        while True:
            began = time.monotonic()
            clock = time.strftime("%H:%M:%S")
            try:
                report = _look(settings, locked)
            except SwarmError as error:
                typer.echo(f"{clock} unknown: {error}", err=True)
                code = error.exit_code
            else:
                code = report.exit_code
                if last is None or json_output:
                    _show(report, json_output, html)
                else:
                    for line in changes(last, report) or [f"{report.verdict.value}, nothing changed"]:
                        typer.echo(f"{clock} {line}")
                    if html is not None:
                        _write_page(report, html)
                sys.stdout.flush()
                last = report
            time.sleep(max(0.0, every - (time.monotonic() - began)))
    except KeyboardInterrupt:
        return code


def _write_page(report: "HealthReport", html: Path) -> None:
    from petals_eval.health.page import page
    from petals_eval.runs.disk import write_atomically

    write_atomically(html, [page(report)])

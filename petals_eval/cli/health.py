"""`petals-eval health`: is a swarm fit for work now?"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from petals_eval.cli.flags import flags_of, keys_of
from petals_eval.config import PUBLIC_SWARM
from petals_eval.errors import ConfigError, SwarmError
from petals_eval.health.settings import HealthSettings, LookSettings

if TYPE_CHECKING:
    from petals_eval.health import HealthReport
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


@flags_of(HealthSettings)
@flags_of(LookSettings)
def health(**flags: Any) -> int:
    """Run the command; return its exit code."""
    if ("initial_peers" in flags) == ("public_swarm" in flags):
        raise ConfigError("expected exactly one swarm: --initial-peers MADDR or --public-swarm")
    look = LookSettings(**{key: flags.pop(key) for key in set(keys_of(LookSettings).values()) & flags.keys()})
    settings = HealthSettings(**{"initial_peers": PUBLIC_SWARM, **flags})
    if look.public_swarm:
        typer.echo(STRANGERS, err=True)
    if look.serve is not None:
        from petals_eval.health.serving import serve_health

        return serve_health(
            settings,
            look.serve,
            look.every,
            look.history,
            say=lambda line: typer.echo(line, err=True),
            dial_networks=look.dial_networks if look.is_reachable else None,
        )
    if look.watch:
        return _watch(settings, look)
    report = _look(settings)
    _show(report, look)
    return report.exit_code


def _look(settings: HealthSettings, locked: "LockedServers | None" = None) -> "HealthReport":
    from petals_eval.health.check import check

    return check(settings, locked)


def _show(report: "HealthReport", look: LookSettings) -> None:
    from petals_eval.health.terminal import print_report
    from petals_eval.text import console_for

    if look.html is not None:
        _write_page(report, look.html)
        typer.echo(f"page: {look.html}", err=True)
    if look.json_output:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print_report(report, console_for(sys.stdout))


def _watch(settings: HealthSettings, look: LookSettings) -> int:
    """Look until Ctrl-C. Show the first look in full, then what changed; with --json a line each, in full."""
    from petals_eval.health.changes import changes
    from petals_eval.health.locked import LockedServers

    locked = LockedServers()
    before: HealthReport | None = None
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
                if before is None or look.json_output:
                    _show(report, look)
                else:
                    for line in changes(before, report) or [f"{report.verdict.value}, nothing changed"]:
                        typer.echo(f"{clock} {line}")
                    if look.html is not None:
                        _write_page(report, look.html)
                sys.stdout.flush()
                before = report
            time.sleep(max(0.0, look.every - (time.monotonic() - began)))
    except KeyboardInterrupt:
        return code


def _write_page(report: "HealthReport", html: Path) -> None:
    from petals_eval.health.page import page
    from petals_eval.runs.disk import write_atomically

    write_atomically(html, [page(report)])

"""`petals-eval health --serve`: look again and again, and answer browsers and Prometheus about the last look."""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from petals_eval.errors import ConfigError, MachineError, SwarmError
from petals_eval.health.changes import changes
from petals_eval.health.check import check as check_once
from petals_eval.health.history import History
from petals_eval.health.locked import LockedServers
from petals_eval.health.metrics import CONTENT_TYPE_LATEST, Tally, exposition
from petals_eval.health.page import page
from petals_eval.health.reachability import Network, Reachability, dial_in_swarm
from petals_eval.health.results import SCHEMA_VERSION, HealthReport
from petals_eval.health.settings import HealthSettings

__all__ = ["HealthServer", "Monitor", "address_of", "serve_health"]

_METRICS = ("/metrics", "/api/prometheus")  # the second as at the Petals health monitor
_IS_REACHABLE = "/api/v1/is_reachable/"
_OVERDUE_PERIODS = 3  # after which a monitor that has not looked is not well itself


def address_of(text: str) -> tuple[str, int]:
    """Return the host and the port to listen at. Without a host that is this machine alone. Raises ConfigError.

    >>> address_of(":9090"), address_of("0.0.0.0:9090"), address_of("[::1]:80")
    (('127.0.0.1', 9090), ('0.0.0.0', 9090), ('::1', 80))
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--serve: expected [HOST]:PORT such as :9090 or 0.0.0.0:9090, found {text!r}")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


class Monitor:
    """Looks at a swarm every so often, and keeps what it saw last, for any thread to read."""

    def __init__(
        self,
        settings: HealthSettings,
        every: float,
        history: History,
        say: Callable[[str], object],
        check: Callable[[HealthSettings], HealthReport] | None = None,
    ):
        """
        every: seconds between the beginnings of two looks. say: tells a person what changed.
        check: takes a look. None: over the network, remembering what is not to be asked each time.
        """
        self._settings = settings
        self._every = every
        self._history = history
        self._say = say
        self._check = check or partial(check_once, locked=LockedServers())
        self._lock = threading.Lock()
        self._report: HealthReport | None = None
        self._error: str | None = None
        self._began = self._ended = time.monotonic()
        self._tally = Tally()

    def look_until(self, stop: threading.Event) -> None:
        """Look again and again until the event is set."""
        while not stop.is_set():
            began = time.monotonic()
            self.look()
            stop.wait(max(0.0, self._every - (time.monotonic() - began)))

    def look(self) -> None:
        """Look once. A swarm that cannot be reached is a result like any other."""
        now = time.time()
        try:
            report = self._check(self._settings)
        except SwarmError as error:
            self._failed(now, str(error))
            return
        with self._lock:
            before, self._report, self._error = self._report, report, None
            self._count(report, before)
            self._tally.up = True
            self._ended = time.monotonic()
        self._history.add(report)
        for line in changes(before, report) if before else [f"{report.verdict.value}"]:
            self._say(f"{time.strftime('%H:%M:%S')} {line}")

    def _failed(self, now: float, error: str) -> None:
        with self._lock:
            self._error = error
            self._tally.looks += 1
            self._tally.failures += 1
            self._tally.up = False
            self._ended = time.monotonic()
        self._history.add_failure(now)
        self._say(f"{time.strftime('%H:%M:%S')} unknown: {error}")

    def _count(self, report: HealthReport, before: HealthReport | None) -> None:
        tally = self._tally
        tally.looks += 1
        tally.calls += report.traffic.calls
        tally.bytes_sent += report.traffic.bytes_sent
        tally.bytes_received += report.traffic.bytes_received
        old = {model.name: model.verdict for model in before.models} if before else {}
        for model in report.models:
            changed = model.name in old and old[model.name] is not model.verdict
            tally.changes[model.name] = tally.changes.get(model.name, 0) + changed

    def state(self) -> dict[str, Any]:
        """Return the report of the last look that reached the swarm, and whether the last one did (/api/v1/state)."""
        with self._lock:
            report, error, looks = self._report, self._error, self._tally.looks
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": "unknown" if report is None or error is not None else report.verdict.value,
            "error": error,
            "looks": looks,
            "looking_seconds": time.monotonic() - self._began,
            "report": None if report is None else report.to_json(),
        }

    def page(self) -> str:
        """Return the HTML page."""
        now = time.time()
        with self._lock:
            report, error, looks = self._report, self._error, self._tally.looks
        uptimes = {}
        for model in report.models if report else ():
            uptimes[model.name] = self._history.uptime(model.name, model.num_blocks, now)
        seconds = time.monotonic() - self._began
        return page(report, uptimes, error=error, reload=self._every, looks=looks, seconds=seconds)

    def metrics(self) -> bytes:
        """Return what Prometheus scrapes."""
        with self._lock:
            return exposition(self._report if self._tally.up else None, self._tally)

    def is_well(self) -> bool:
        """Return whether it still looks: this is about itself, not about the swarm."""
        with self._lock:
            silent = time.monotonic() - self._ended
        return silent < _OVERDUE_PERIODS * self._every + 2 * self._settings.time_limit + self._settings.startup_timeout


class HealthServer(ThreadingHTTPServer):
    """Answers GET and HEAD of a few paths, and nothing else."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], monitor: Monitor, reachability: Reachability | None = None):
        """reachability: None: it does not answer whether a peer can be reached."""
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.monitor = monitor
        self.reachability = reachability
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer
    server_version = "petals-eval"
    sys_version = ""
    timeout = 30.0  # seconds for a client to say what it wants

    def do_GET(self) -> None:
        monitor = self.server.monitor
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", monitor.page().encode())
        elif path == "/api/v1/state":
            text = json.dumps(monitor.state(), ensure_ascii=False, allow_nan=False)
            self._answer(HTTPStatus.OK, "application/json", text.encode())
        elif path in _METRICS:
            self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, monitor.metrics())
        elif path.startswith(_IS_REACHABLE) and self.server.reachability is not None:
            self._say_whether_reachable(self.server.reachability, path.removeprefix(_IS_REACHABLE))
        elif path == "/healthz":
            well = monitor.is_well()
            status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "text/plain; charset=utf-8", b"ok\n" if well else b"has not looked for too long\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"/ /api/v1/state /metrics /healthz\n")

    do_HEAD = do_GET

    def _say_whether_reachable(self, reachability: Reachability, peer_id: str) -> None:
        """Answer as the Petals health monitor does: servers tell their owner the message and the address."""
        visitor = str(self.client_address[0])
        found = reachability.answer(peer_id, visitor)
        text = json.dumps({"success": found.success, "message": found.message, "your_ip": visitor})
        self._answer(found.status, "application/json", text.encode(), found.retry_after)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, retry_after: int | None = None) -> None:
        self.send_response(status)
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: who asked for what is nobody's business here."""


def serve_health(
    settings: HealthSettings,
    address: str,
    every: float,
    history: Path | None,
    say: Callable[[str], object],
    dial_networks: Sequence[Network] | None = None,
) -> int:
    """Serve until Ctrl-C. Raises ConfigError for the address, MachineError where it or the history cannot be used.

    dial_networks: networks beside the public ones where peers are dialled that visitors name; None: no peer is.
    """
    where = address_of(address)
    past = History(history)
    monitor = Monitor(settings, every, past, say)
    reachability = None
    if dial_networks is not None:
        reachability = Reachability(dial_in_swarm(settings.initial_peers), dial_networks)
    try:
        server = HealthServer(where, monitor, reachability)
    except OSError as error:
        past.close()
        raise MachineError(f"cannot listen on {address}: {error.strerror}. Choose another port.") from error
    stop = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True, name="health page").start()
    host = f"[{where[0]}]" if ":" in where[0] else where[0]
    paths = ["/api/v1/state", "/metrics", "/healthz", *([] if reachability is None else [_IS_REACHABLE])]
    say(f"serving http://{host}:{server.server_address[1]}/ ({', '.join(paths)}); Ctrl-C ends it.")
    try:
        monitor.look_until(stop)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        server.shutdown()
        server.server_close()
        past.close()
        if reachability is not None:
            reachability.close()
    return 0

"""How far a run is: a bar on a terminal, a line now and then where there is none. Always on stderr, so that stdout is
the result alone."""

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from petals_eval.report.numbers import rate_text
from petals_eval.text import console_for, plural, printable

__all__ = ["ProgressDisplay"]

BAR_WIDTH = 20
RATE_WINDOW = 30.0  # seconds; the time left follows what the swarm does now
LINE_SECONDS = 10.0  # between plain lines


class ProgressDisplay:
    """A context manager. Its methods may be called from any thread, as often as one likes.

    total: examples of the run, None if unknown. done: of them, scored before this display began (a resumed run).
    stream: stderr if None. every: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        total: int | None,
        stream: IO[str] | None = None,
        *,
        done: int = 0,
        every: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._clock = clock
        self._every = every
        self._console = console_for(stream or sys.stderr)
        self._done = done
        self._retries = 0
        self._servers = 0
        self._waiting: str | None = None
        self._seen: deque[tuple[float, int]] = deque([(clock(), done)])
        self._last_line = clock()
        self._last_waiting = float("-inf")
        self._live: Live | None = None

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None:
        """Show where the run is.

        done: examples finished in all. retries: micro-batches sent again. servers: in use.
        message: a line that stays, a warning for instance.
        """
        now = self._clock()
        if done > self._done:
            self._waiting = None
        self._done, self._retries, self._servers = done, retries, servers
        if now - self._seen[-1][0] >= 0.1:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_WINDOW:
            self._seen.popleft()
        if message is not None:
            self._say(message)
        if self._live is None and now - self._last_line >= self._every:
            self._last_line = now
            self._say(self.status())

    def waiting(self, message: str) -> None:
        """Show why nothing moves, until something does: "waiting for the swarm: no server holds blocks 24:30 (...)"."""
        begun = self._waiting is None
        self._waiting = printable(message)
        now = self._clock()
        if self._live is None and (begun or now - self._last_waiting >= self._every):
            self._last_waiting = now
            self._say(message)

    def status(self) -> str:
        """Return one line: done, speed, time left, retries, servers."""
        parts = [f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"]
        rate = self._rate()
        if rate is not None:
            parts.append(f"{rate_text(rate)} ex/s")
            if self._waiting is not None:
                parts.append("waiting")
            elif self._total is not None and rate > 0 and self._done < self._total:
                parts.append(f"{_duration((self._total - self._done) / rate)} left")
        parts += [plural(self._retries, "retry", "retries"), plural(self._servers, "server")]
        return " · ".join(parts)

    def _rate(self) -> float | None:
        """Return the examples per second of the last `RATE_WINDOW` seconds, or None."""
        (then, before), now = self._seen[0], self._clock()
        return (self._done - before) / (now - then) if now > then and self._done > before else None

    def _say(self, line: str) -> None:
        self._console.print(Text(printable(line)), soft_wrap=True)

    def _draw(self) -> RenderableType:
        status = Text(self.status(), no_wrap=True, overflow="ellipsis")
        row: RenderableType = status
        if BAR_WIDTH + 1 + status.cell_len <= self._console.width:
            bar = ProgressBar(total=self._total, completed=self._done, width=BAR_WIDTH, pulse=self._total is None)
            row = Table.grid(padding=(0, 1))
            row.add_row(bar, status)
        return row if self._waiting is None else Group(row, Text(self._waiting))

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # stdout is left alone: what is printed there is the result, and may be piped elsewhere.
            self._live = Live(
                console=self._console, get_renderable=self._draw, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is None:
            if error is None or self._done:  # what failed before it began has no progress to show
                self._say(self.status())
        else:
            self._live.stop()
            self._live = None


def _duration(seconds: float) -> str:
    """
    >>> _duration(9.4), _duration(65), _duration(7322)
    ('0:09', '1:05', '2:02:02')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

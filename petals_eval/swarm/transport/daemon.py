"""Workarounds for hivemind 1.1's libp2p daemon, which every call goes through."""

import asyncio
from contextlib import suppress
from typing import Any

from anyio import CancelScope
from hivemind.p2p import P2P

from petals_eval.environment import environment_defaults
from petals_eval.swarm.transport.late_answers import keep_reading

__all__ = ["end_daemon", "start_daemon", "wait_until_lost"]

_GO = {"GOMAXPROCS": "1", "GOGC": "200"}
"""Environment variables of Go's runtime, unless the user has set them. The daemon only passes on messages of some
hundred KiB, and spent two fifths of its processor time on collecting them as garbage and on threads that look for work:
6.5 ms for each MB moved, 3.7 ms like this, on two cores, and 200 MB of memory, not 130."""


async def start_daemon(**options: Any) -> P2P:
    """Start a daemon as `P2P.create` does with these options, with a reader that late answers do not end.

    `dht_mode` may be "off", too.

    hivemind hands on the environment it finds: what other threads start meanwhile gets Go's variables too.
    """
    started: list[P2P] = []

    class Daemon(P2P):
        """Known from its first moment on: hivemind leaves one whose start fails or is cancelled to itself. The garbage
        collector then finds it after the end of the loop, which it still needs."""

        # "off": it asks nobody for addresses, and dials those alone that it is told.
        DHT_MODE_MAPPING = P2P.DHT_MODE_MAPPING | {"off": {}}

        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    try:
        with environment_defaults(_GO):
            p2p = await Daemon.create(**options)
    except BaseException:
        with CancelScope(shield=True):
            for each in started:
                await _kill(each)
        raise
    keep_reading(p2p)
    return p2p


async def wait_until_lost(p2p: P2P) -> None:
    """Return when the line to the daemon is broken: the daemon has ended, or what came from it cannot be read.

    From then on no call gets an answer, and hivemind raises nothing: whoever waits has to be told.
    """
    control = p2p._client.control
    await asyncio.wait({control._read_task, control._write_task}, return_when=asyncio.FIRST_COMPLETED)


async def end_daemon(p2p: P2P, timeout: float) -> None:
    """Shut the daemon down; kill it when it has not ended after `timeout` seconds."""
    try:
        await asyncio.wait_for(p2p.shutdown(), timeout)
    except TimeoutError:
        await _kill(p2p)


async def _kill(p2p: P2P) -> None:
    """Kill the daemon, if it runs, and wait until it has ended and what it said was read."""
    if p2p._child is not None:
        with suppress(ProcessLookupError):
            p2p._child.kill()
        await p2p._child.wait()
    if p2p._reader_task is not None:
        await asyncio.wait([p2p._reader_task])

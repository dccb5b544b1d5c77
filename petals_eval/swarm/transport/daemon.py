"""Workarounds for hivemind 1.1's libp2p daemon, which every call goes through."""

import asyncio
from contextlib import suppress
from typing import Any

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

    hivemind hands on the environment it finds: what other threads start meanwhile gets Go's variables too.
    """
    with environment_defaults(_GO):
        p2p = await P2P.create(**options)
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
        with suppress(ProcessLookupError):
            p2p._child.kill()
        await p2p._child.wait()

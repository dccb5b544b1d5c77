"""A server as a process of its own: settings in, one line out when it serves, and an end when the launcher is gone."""

import asyncio
import json
import os
import signal
import socket
import traceback

import torch

from petals_eval.local_swarm.faults.catalog import FaultList
from petals_eval.local_swarm.server.block_server import BlockServer
from petals_eval.local_swarm.server.settings import ServerSettings

__all__ = ["serve"]


async def serve(settings: ServerSettings, control: socket.socket) -> int:
    """Serve until the launcher closes its end of `control` (or dies, which closes it too); returns the exit code.

    Writes one line of JSON to `control`: {"peer_id", "maddrs"} once the blocks are served, or
    {"error", "message"}: the exception's class and text. From then on it reads lines: a list of faults to switch to, or
    null. It answers each with how often its faults have acted, and writes that before a crash as well.
    """
    torch.set_num_threads(settings.threads)
    reader, writer = await asyncio.open_connection(sock=control)
    loop = asyncio.get_running_loop()
    opening = asyncio.create_task(BlockServer.open(settings))
    told_to_stop = asyncio.create_task(_obey(reader, writer, opening))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.cancel)
    await asyncio.wait({opening, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        opening.cancel()
        await asyncio.wait({opening})
        return 0
    if (error := opening.exception()) is not None:
        traceback.print_exception(error)
        await _say(writer, {"error": type(error).__name__, "message": str(error)})
        return 1
    server = opening.result()

    async def crash() -> None:
        await _say(writer, _counts(server))
        os.killpg(os.getpgrp(), signal.SIGKILL)  # its libp2p daemon, too

    server.on_crash = crash
    try:
        await _say(writer, {"peer_id": server.peer.peer_id, "maddrs": server.peer.maddrs})
        await asyncio.wait({told_to_stop})
    finally:
        await server.close()
    return 0


async def _obey(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opening: "asyncio.Task[BlockServer]"
) -> None:
    """Do what the launcher says until it is gone."""
    while line := await reader.readline():
        server = await asyncio.shield(opening)
        if line != b"null\n":
            await server.switch(FaultList.validate_json(line))
        await _say(writer, _counts(server))


def _counts(server: BlockServer) -> dict[str, dict[str, int]]:
    return {name: count.model_dump() for name, count in server.faults.counts.items()}


async def _say(writer: asyncio.StreamWriter, answer: object) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()

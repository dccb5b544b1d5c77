"""A server as a process of its own: settings in, one line out when it serves, and an end when the launcher is gone."""

import asyncio
import json
import signal
import socket
import traceback

import torch

from petals_eval.local_swarm.server import BlockServer
from petals_eval.local_swarm.settings import ServerSettings

__all__ = ["serve"]


async def serve(settings: ServerSettings, control: socket.socket) -> int:
    """Serve until the launcher closes its end of `control` (or dies, which closes it too); returns the exit code.

    Writes one line of JSON to `control`: {"peer_id", "maddrs"} once the blocks are served, or
    {"error", "message"}: the exception's class and text.
    """
    torch.set_num_threads(settings.threads)
    reader, writer = await asyncio.open_connection(sock=control)
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.create_task(reader.read())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.cancel)
    opening = asyncio.create_task(BlockServer.open(settings))
    await asyncio.wait({opening, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
    if not opening.done():
        opening.cancel()
        await asyncio.wait({opening})
        return 0
    if (error := opening.exception()) is not None:
        traceback.print_exception(error)
        writer.write(json.dumps({"error": type(error).__name__, "message": str(error)}).encode() + b"\n")
        await writer.drain()
        return 1
    server = opening.result()
    try:
        writer.write(json.dumps({"peer_id": server.peer.peer_id, "maddrs": server.peer.maddrs}).encode() + b"\n")
        await writer.drain()
        await asyncio.wait({told_to_stop})
    finally:
        await server.close()
    return 0

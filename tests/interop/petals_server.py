"""Runs a server's `cli.run_server` for real_petals.py, in its environment. First argument: petals, drift or bloombee.

It loads that package at once and then waits for a line on stdin, the JSON list of arguments still missing (which swarm
to join). So several servers load in parallel although the first must be up before the others can join it. When stdin
ends because whoever started it is gone, the whole process group is killed: no test run leaves a server or a p2pd
behind.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading

import loopback_only  # noqa: F401

PACKAGE = sys.argv.pop(1)
run_server = importlib.import_module(f"{PACKAGE}.cli.run_server")


def read_line() -> str:
    """From the bare descriptor: multiprocessing's children close sys.stdin, and must not find it in use."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("nobody said which swarm to join")
        line += byte
    return line.decode()


def end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def without_bitsandbytes() -> None:
    """As hivemind finds a machine without it; Petals itself imports it whatever happens."""
    from bitsandbytes import functional

    del functional.quantize_blockwise, functional.dequantize_blockwise


def log_rpc_info() -> None:
    """In the words in which Petals logs every other call: tests count what a client asks of a server."""
    Handler = importlib.import_module(f"{PACKAGE}.server.handler").TransformerConnectionHandler
    answer = Handler.rpc_info

    @functools.wraps(answer)
    async def rpc_info(self, request, context):
        self._log_request("rpc_info", [request.uid], context)
        return await answer(self, request, context)

    Handler.rpc_info = rpc_info


if __name__ == "__main__":
    if os.environ.get("WITHOUT_BITSANDBYTES"):
        without_bitsandbytes()
    log_rpc_info()
    sys.argv += json.loads(read_line())
    threading.Thread(target=end_with_parent, daemon=True).start()
    run_server.main()

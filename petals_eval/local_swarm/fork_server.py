"""The process that server processes are forked from.

Importing torch, hivemind and transformers takes a server seconds of processor time; forked from here, where they are
imported once, it is up in a fraction of one. Servers stay separate processes: each leads a process group of its own
with its libp2p daemon, so that one signal kills both and nothing else.

Asked for in one line of JSON (the settings) with two file descriptors: the server's end of its line to the launcher,
and where its messages go. Answered with the new process's id. Ends, after its servers, when the launcher closes the
line or dies.
"""

import asyncio
import ctypes
import importlib
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress

__all__ = ["main"]

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# What a server needs whatever its model; the model's own module comes on top.
_IMPORTS = (
    "petals_eval.local_swarm.server.main",
    "transformers.models.auto.modeling_auto",
    "petals_eval.local_swarm.server.kv_cache",
)


def main(line: socket.socket, model_type: str) -> None:
    """Fork servers as asked for on `line`, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the launcher, which ends the servers in order
    for name in (*_IMPORTS, f"transformers.models.{model_type}.modeling_{model_type}"):
        with suppress(ModuleNotFoundError):  # an unknown family: the server says so in better words
            importlib.import_module(name)
    # The kernel buries what ends here: servers, and the daemons of servers that were killed.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while True:
        request, descriptors = _receive(line)
        if not request:
            break
        pid = os.fork()
        if pid == 0:
            line.close()
            _serve(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        line.sendall(f"{pid}\n".encode())
    with suppress(ChildProcessError):  # raised when the last one is gone
        os.waitpid(-1, 0)
    os._exit(0)  # taking down an interpreter with all these modules would take a second


def _receive(line: socket.socket) -> tuple[bytes, list[int]]:
    request, descriptors = b"", []
    while not request.endswith(b"\n"):
        part, received, _, _ = socket.recv_fds(line, 1 << 16, 2)
        if not part:
            return b"", []
        request += part
        descriptors += received
    return request, list(descriptors)


def _serve(request: bytes, control: int, log: int) -> None:
    """The new process: serve until the launcher says so or is gone. Does not return."""
    from petals_eval.local_swarm.server.main import serve
    from petals_eval.local_swarm.server.settings import ServerSettings

    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        code = asyncio.run(serve(ServerSettings.model_validate_json(request), socket.socket(fileno=control)))
    finally:
        # The end of the road for this process whatever happened: it must not return into the nursery's loop.
        if error := sys.exc_info()[1]:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])

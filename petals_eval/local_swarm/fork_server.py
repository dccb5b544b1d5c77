"""The process that server processes are forked from.

Importing torch, hivemind and transformers takes a server seconds of processor time; forked from a process in which they
are imported, it is up in a fraction of one. Servers stay separate processes: each leads a process group of its own with
its libp2p daemon, so that one signal kills both and nothing else.

`ForkServer` is the launcher's side, `main` the process. The launcher asks in one line of JSON (the settings) with two
file descriptors: the server's end of its line to the launcher, and where its messages go. The answer is the new
process's id. The process ends, after its servers, when the launcher closes the line or dies.

multiprocessing's own fork server will not do: it imports `__main__` anew, which a notebook does not survive.
"""

import asyncio
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO

from petals_eval.errors import MachineError
from petals_eval.local_swarm.server.settings import ServerSettings

__all__ = ["ForkServer", "last_words", "main"]

_END_TIMEOUT = 15.0
"""Seconds that the process may take to end, after its servers."""
_ROOT = Path(__file__).resolve().parents[2]
"""Where the package is imported from, be it installed or not."""
_COMMAND = f"import socket, sys; from {__name__} import main; main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])"
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_IMPORTS = (
    "petals_eval.local_swarm.server.main",
    "transformers.models.auto.modeling_auto",
    "petals_eval.local_swarm.server.kv_cache",
)
"""What a server needs whatever its model; the model's own module comes on top."""


class ForkServer:
    """Starts server processes. Close it when their launcher needs no more of them."""

    def __init__(self, model_type: str):
        self._has_forked = False
        self._line, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the fork server
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        # One thread of arithmetic a server: many servers share this machine.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), model_type],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                env={**os.environ, **threads, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            )

    def fork(self, settings: ServerSettings, control: socket.socket, log: IO[bytes], deadline: float) -> int:
        """Start a server process with these ends of its lines; returns its process id.

        deadline: on the monotonic clock. Raises MachineError when no process can be started by then.
        """
        try:
            self._line.settimeout(max(0.0, deadline - time.monotonic()))
            request = settings.model_dump_json().encode() + b"\n"
            socket.send_fds(self._line, [request], [control.fileno(), log.fileno()])
            answer = self._line.recv(64)
        except OSError as error:  # TimeoutError is one
            raise MachineError(f"server processes cannot be started ({error!r}){last_words(self._log)}") from error
        if not answer:
            raise MachineError(f"the process that starts servers ended{last_words(self._log)}")
        self._has_forked = True
        return int(answer)

    def close(self) -> None:
        """End the process; returns when all its servers are gone, which must have been told to end."""
        self._line.close()
        if not self._has_forked:
            self._process.kill()  # it may still be importing
        try:
            self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def last_words(log: IO[bytes], limit: int = 2000) -> str:
    """Return the last `limit` bytes of a log, on lines of their own, for the end of a message; empty when it is."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - limit))
    text = log.read().decode(errors="replace").strip()
    return f"; its last words:\n{text}" if text else ""


def main(line: socket.socket, model_type: str) -> None:
    """Fork servers as asked for on `line`, until it is closed. Does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the launcher, which ends the servers in order
    family = model_type.removesuffix("_text")  # the language model of a multimodal one lies beside it
    for name in (*_IMPORTS, f"transformers.models.{family}.modeling_{family}"):
        with suppress(ModuleNotFoundError):  # an unknown family: the server says so in better words
            importlib.import_module(name)
    # The kernel reaps what ends here: servers, and the daemons of servers that were killed.
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
    """Return the next request with its file descriptors; an empty one when the launcher is gone."""
    request, descriptors = b"", []
    while not request.endswith(b"\n"):
        part, received, _, _ = socket.recv_fds(line, 1 << 16, 2)
        if not part:
            return b"", []
        request += part
        descriptors += received
    return request, list(descriptors)


def _serve(request: bytes, control: int, log: int) -> None:
    """Serve, in the new process, until the launcher says so or is gone. Does not return."""
    from petals_eval.local_swarm.server.main import serve

    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        code = asyncio.run(serve(ServerSettings.model_validate_json(request), socket.socket(fileno=control)))
    finally:
        # The end of the road for this process whatever happened: it must not return into the loop of `main`.
        if error := sys.exc_info()[1]:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

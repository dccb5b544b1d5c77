"""The servers of a local swarm as their launcher sees them: processes that can be killed, or tasks in a thread."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import petals_eval
from petals_eval.errors import MachineError, ModelError, SwarmUnreachableError
from petals_eval.local_swarm.faults.catalog import AnyFault, Faults, Hits
from petals_eval.local_swarm.loop_thread import LoopThread
from petals_eval.local_swarm.server.settings import ServerSettings

__all__ = ["LocalServer", "Nursery", "ProcessServer", "ThreadServer"]

_STOP_TIMEOUT = 15.0  # seconds for a server to say goodbye before it is killed
_ANSWER_TIMEOUT = 30.0  # seconds for a server to hear what it is told
_POLL = 0.005  # seconds


class LocalServer(Protocol):
    """One server of a local swarm."""

    @property
    def settings(self) -> ServerSettings: ...

    @property
    def span(self) -> tuple[int, int]:
        """Its blocks, as first:last."""

    @property
    def peer_id(self) -> str:
        """Its libp2p peer id, base58."""

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Addresses others are told."""

    @property
    def pid(self) -> int:
        """The process it runs in; its daemon is a child of that."""

    def is_alive(self) -> bool: ...

    def switch(self, *faults: AnyFault) -> None:
        """These faults and no others from now on; none: it is well again. Returns when it knows."""

    def hits(self) -> dict[str, Hits]:
        """What its faults have hit since it started, by their names; also after one has ended it."""

    def wait_ready(self, deadline: float) -> None:
        """Wait until it serves; raises MachineError, ModelError or SwarmUnreachableError when it cannot.

        deadline: on the monotonic clock; at it MachineError is raised.
        """

    def request_stop(self) -> None:
        """Tell it to end, without waiting."""

    def stop(self) -> None:
        """End it in order: it announces OFFLINE first. Does nothing when it has ended."""

    def kill(self) -> None:
        """End it as a crash does, its libp2p daemon with it: nothing is announced."""


class _Served:
    """What both kinds of server know about themselves."""

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.peer_id = ""
        self.maddrs: tuple[str, ...] = ()

    @property
    def span(self) -> tuple[int, int]:
        return self.settings.first, self.settings.last

    @property
    def _name(self) -> str:
        return f"the server of blocks {self.settings.first}:{self.settings.last}"


class Nursery:
    """The process that server processes are forked from; see `petals_eval.local_swarm.fork_server`."""

    def __init__(self, model_type: str):
        self._has_forked = False
        self._line, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the nursery
        root = str(Path(petals_eval.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # One thread of arithmetic a server: many servers share this machine.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "petals_eval.local_swarm.fork_server", str(theirs.fileno()), model_type],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
                env={**os.environ, **threads, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            )

    def fork(self, settings: ServerSettings, control: socket.socket, log: IO[bytes], deadline: float) -> int:
        """Start a server process with these ends of its lines; returns its process id."""
        try:
            self._line.settimeout(max(0.0, deadline - time.monotonic()))
            request = settings.model_dump_json().encode() + b"\n"
            socket.send_fds(self._line, [request], [control.fileno(), log.fileno()])
            answer = self._line.recv(64)
        except OSError as error:  # TimeoutError is one
            raise MachineError(f"server processes cannot be started ({error!r}){last_words(self.log)}") from error
        if not answer:
            raise MachineError(f"the process that starts servers ended{last_words(self.log)}")
        self._has_forked = True
        return int(answer)

    def close(self) -> None:
        """End it; returns when all its servers are gone, which must have been told to end."""
        self._line.close()
        if not self._has_forked:
            self._process.kill()  # it may still be importing
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.log.close()


class ProcessServer(_Served):
    """A server in a process of its own, its libp2p daemon in the same process group."""

    def __init__(self, settings: ServerSettings, nursery: Nursery, deadline: float):
        super().__init__(settings)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        self._hits: dict[str, Hits] = {}
        self._received = b""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._pid = nursery.fork(settings, theirs, self._log, deadline)

    def wait_ready(self, deadline: float) -> None:
        line = b""
        try:
            while not line.endswith(b"\n"):
                self._control.settimeout(max(0.001, deadline - time.monotonic()))
                part = self._control.recv(4096)
                if not part:
                    raise MachineError(f"{self._name} ended before it served{last_words(self._log)}")
                line += part
        except TimeoutError:
            raise MachineError(f"{self._name} did not serve in time{last_words(self._log)}") from None
        answer = json.loads(line)
        if "error" in answer:
            for kind in (ModelError, SwarmUnreachableError):
                if answer["error"] == kind.__name__:
                    raise kind(answer["message"])
            raise MachineError(f"{self._name} could not start: {answer['error']}: {answer['message']}")
        self.peer_id, self.maddrs = answer["peer_id"], tuple(answer["maddrs"])

    def is_alive(self) -> bool:
        """Its end of the line closes with the process, so this cannot mistake another process of the same id for it."""
        if self._control.fileno() < 0:
            return False
        self._control.settimeout(0)
        try:
            while part := self._control.recv(4096):
                self._received += part  # the last words of one that crashed
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def switch(self, *faults: AnyFault) -> None:
        self._say(Faults.dump_json(faults))

    def hits(self) -> dict[str, Hits]:
        if self.is_alive():
            with suppress(MachineError):  # it crashes just now
                self._say(b"null")
        self._read_hits()
        return self._hits

    def _say(self, line: bytes) -> None:
        """Send it a line and wait for its answer. Raises MachineError when it is gone."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        self._received = b""
        try:
            self._control.settimeout(_ANSWER_TIMEOUT)
            self._control.sendall(line + b"\n")
            while not self._received.endswith(b"\n"):
                self._control.settimeout(max(0.001, deadline - time.monotonic()))
                part = self._control.recv(4096)
                if not part:
                    break
                self._received += part
        except OSError as error:  # TimeoutError is one
            raise MachineError(f"{self._name} does not listen to its launcher ({error!r})") from error
        if not self._received.endswith(b"\n"):
            raise MachineError(f"{self._name} has ended")
        self._read_hits()

    def _read_hits(self) -> None:
        """The last whole line it wrote."""
        lines = self._received.split(b"\n")
        if len(lines) > 1:
            self._hits = {name: Hits(**hits) for name, hits in json.loads(lines[-2]).items()}

    def request_stop(self) -> None:
        """Tell it to end, without waiting."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        if self._control.fileno() < 0:
            return
        self.request_stop()
        if not self._wait_gone(_STOP_TIMEOUT):
            self._signal_group()
            self._wait_gone(_STOP_TIMEOUT)
        self._close()

    def kill(self) -> None:
        if self.is_alive():
            self._signal_group()
            self._wait_gone(_STOP_TIMEOUT)
        self._close()

    @property
    def pid(self) -> int:
        return self._pid

    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        return last_words(self._log)

    def _signal_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _wait_gone(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._pid, 0)  # raises once neither the server nor its daemon is left
                time.sleep(_POLL)
            return False
        return True

    def _close(self) -> None:
        self._control.close()


class ThreadServer(_Served):
    """A server in this process: quick to start; all of them and their clients share one interpreter."""

    def __init__(self, settings: ServerSettings, loop: LoopThread):
        from petals_eval.local_swarm.server.block_server import BlockServer

        super().__init__(settings)
        self._loop = loop
        self._opening: Future[BlockServer] = loop.submit(BlockServer.open(settings))
        self._server: BlockServer | None = None
        self._ending: Future[None] | None = None

    def wait_ready(self, deadline: float) -> None:
        try:
            self._server = self._opening.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            self._opening.cancel()
            raise MachineError(f"{self._name} did not serve in time") from None
        self._server.on_crash = self._crash
        self.peer_id, self.maddrs = self._server.peer.peer_id, self._server.peer.maddrs

    @property
    def pid(self) -> int:
        return os.getpid()

    def is_alive(self) -> bool:
        return self._server is not None

    def switch(self, *faults: AnyFault) -> None:
        if self._server is None:
            raise MachineError(f"{self._name} has ended")
        self._loop.run(self._server.switch(faults), _ANSWER_TIMEOUT)

    def hits(self) -> dict[str, Hits]:
        opened = self._opening.result() if self._opening.done() and not self._opening.cancelled() else None
        return {} if opened is None else {name: hits.model_copy() for name, hits in opened.faults.hits.items()}

    async def _crash(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.abort()

    def request_stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._ending = self._loop.submit(server.close())

    def stop(self) -> None:
        self.request_stop()
        if self._ending is not None:
            self._ending.result(_STOP_TIMEOUT)

    def kill(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            self._loop.run(server.abort(), _STOP_TIMEOUT)


def last_words(log: IO[bytes], limit: int = 2000) -> str:
    """The last `limit` bytes of a log, on lines of their own; empty when it is."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - limit))
    text = log.read().decode(errors="replace").strip()
    return f"; its last words:\n{text}" if text else ""

"""The servers of a local swarm as their launcher sees them: processes that can be killed, or tasks in a thread."""

import json
import os
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from anyio.from_thread import BlockingPortal

from petals_eval.errors import MachineError, ModelError, SwarmUnreachableError
from petals_eval.local_swarm.faults.catalog import AnyFault, FaultCount, FaultList
from petals_eval.local_swarm.fork_server import ForkServer, last_words
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.swarm.wire.span import Span

if TYPE_CHECKING:
    from petals_eval.local_swarm.server.block_server import BlockServer

__all__ = ["LocalServer", "ProcessServer", "ThreadServer"]

_STOP_TIMEOUT = 15.0
"""Seconds that a server may take to end in order before it is killed."""
_ANSWER_TIMEOUT = 30.0
"""Seconds that a server may take to do what it is told and say so."""
_POLL_PERIOD = 0.005  # seconds


class LocalServer(ABC):
    """One server of a local swarm.

    peer_id: its libp2p peer id, base58. maddrs: the addresses that others are told. Both are known once it serves.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.peer_id = ""
        self.maddrs: tuple[str, ...] = ()

    @property
    def span(self) -> Span:
        """The blocks it holds."""
        return self.settings.span

    @property
    def _name(self) -> str:
        return f"the server of blocks {self.span}"

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process it runs in; its daemon is a child of that."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it has not ended."""

    @abstractmethod
    def switch(self, *faults: AnyFault) -> None:
        """Have these faults and no others from now on, or be well again without any. Returns when the server knows."""

    @abstractmethod
    def fault_counts(self) -> dict[str, FaultCount]:
        """Return how often its faults acted since it started, by their names; also after one has ended it."""

    @abstractmethod
    def wait_ready(self, deadline: float) -> None:
        """Wait until it serves; raises MachineError, ModelError or SwarmUnreachableError when it cannot.

        deadline: on the monotonic clock; at it MachineError is raised.
        """

    @abstractmethod
    def request_stop(self) -> None:
        """Tell it to end, without waiting."""

    @abstractmethod
    def stop(self) -> None:
        """End it in order: it announces OFFLINE first. Does nothing when it has ended."""

    @abstractmethod
    def kill(self) -> None:
        """End it as a crash does, its libp2p daemon with it: nothing is announced."""


class ProcessServer(LocalServer):
    """A server in a process of its own, its libp2p daemon in the same process group."""

    def __init__(self, settings: ServerSettings, fork_server: ForkServer, deadline: float):
        super().__init__(settings)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        self._counts: dict[str, FaultCount] = {}
        self._received = b""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._pid = fork_server.fork(settings, theirs, self._log, deadline)

    def wait_ready(self, deadline: float) -> None:
        try:
            if not self._receive_line(deadline):
                raise MachineError(f"{self._name} ended before it served{last_words(self._log)}")
        except TimeoutError:
            raise MachineError(f"{self._name} did not serve in time{last_words(self._log)}") from None
        answer, self._received = json.loads(self._received), b""
        if "error" in answer:
            for kind in (ModelError, SwarmUnreachableError):
                if answer["error"] == kind.__name__:
                    raise kind(answer["message"])
            raise MachineError(f"{self._name} could not start: {answer['error']}: {answer['message']}")
        self.peer_id, self.maddrs = answer["peer_id"], tuple(answer["maddrs"])

    def is_alive(self) -> bool:
        # Its end of the line closes with the process, so this cannot mistake another process of the same id for it.
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
        self._tell(FaultList.dump_json(faults))

    def fault_counts(self) -> dict[str, FaultCount]:
        if self.is_alive():
            with suppress(MachineError):  # it crashes just now
                self._tell(b"null")
        self._read_counts()
        return self._counts

    def _tell(self, line: bytes) -> None:
        """Send it a line and wait for its answer. Raises MachineError when it is gone."""
        self._received = b""
        try:
            self._control.settimeout(_ANSWER_TIMEOUT)
            self._control.sendall(line + b"\n")
            answered = self._receive_line(time.monotonic() + _ANSWER_TIMEOUT)
        except OSError as error:  # TimeoutError is one
            raise MachineError(f"{self._name} does not listen to its launcher ({error!r})") from error
        if not answered:
            raise MachineError(f"{self._name} has ended")
        self._read_counts()

    def _receive_line(self, deadline: float) -> bool:
        """Receive until a line ends, and say whether one did before the process ended. Raises TimeoutError."""
        while not self._received.endswith(b"\n"):
            self._control.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._control.recv(4096)
            if not part:
                return False
            self._received += part
        return True

    def _read_counts(self) -> None:
        """Read the last whole line that it wrote."""
        lines = self._received.split(b"\n")
        if len(lines) > 1:
            self._counts = {name: FaultCount(**count) for name, count in json.loads(lines[-2]).items()}

    def request_stop(self) -> None:
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        if self._control.fileno() < 0:
            return
        self.request_stop()
        if not self._wait_gone():
            self._kill_group()
            self._wait_gone()
        self._control.close()

    def kill(self) -> None:
        if self.is_alive():
            self._kill_group()
            self._wait_gone()
        self._control.close()

    @property
    def pid(self) -> int:
        return self._pid

    def last_words(self) -> str:
        """Return the end of what it wrote to its standard error."""
        return last_words(self._log)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _wait_gone(self) -> bool:
        """Wait until neither the server nor its daemon is left, and say whether that came in time."""
        deadline = time.monotonic() + _STOP_TIMEOUT
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._pid, 0)
                time.sleep(_POLL_PERIOD)
            return False
        return True


class ThreadServer(LocalServer):
    """A server in this process: quick to start; all of them and their clients share one interpreter.

    portal: to the event loop in which they run.
    """

    def __init__(self, settings: ServerSettings, portal: BlockingPortal):
        from petals_eval.local_swarm.server.block_server import BlockServer

        super().__init__(settings)
        self._portal = portal
        self._opening: Future[BlockServer] = portal.start_task_soon(BlockServer.open, settings)
        self._server: BlockServer | None = None
        self._ending: Future[None] | None = None

    def wait_ready(self, deadline: float) -> None:
        try:
            self._server = self._opening.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
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
        self._portal.start_task_soon(self._server.switch, faults).result(_ANSWER_TIMEOUT)

    def fault_counts(self) -> dict[str, FaultCount]:
        opened = self._opening.result() if self._opening.done() and not self._opening.cancelled() else None
        return {} if opened is None else {name: count.model_copy() for name, count in opened.faults.counts.items()}

    def _taken(self) -> "BlockServer | None":
        """Return the server for its end: whoever comes later gets None."""
        server, self._server = self._server, None
        return server

    async def _crash(self) -> None:
        if (server := self._taken()) is not None:
            await server.abort()

    def request_stop(self) -> None:
        if (server := self._taken()) is not None:
            self._ending = self._portal.start_task_soon(server.close)

    def stop(self) -> None:
        self.request_stop()
        if self._ending is not None:
            self._ending.result(_STOP_TIMEOUT)

    def kill(self) -> None:
        if (server := self._taken()) is not None:
            self._portal.start_task_soon(server.abort).result(_STOP_TIMEOUT)

"""The connection to a swarm: one background event loop that owns the libp2p daemon and the DHT node."""

import asyncio
import atexit
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import fail_after
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError as ClockError
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from petals_eval.config import SwarmSettings
from petals_eval.errors import SwarmError, SwarmUnreachableError
from petals_eval.swarm.peers.caches import CacheBook
from petals_eval.swarm.transport.codec_negotiation import WireBook
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon, wait_until_lost
from petals_eval.swarm.wire.msgpack_reader import bound_hivemind

if TYPE_CHECKING:
    from petals_eval.swarm.remote_sequential import RemoteSequential

__all__ = ["SwarmConnection"]

T = TypeVar("T")

_SHUTDOWN_TIMEOUT = 5.0  # seconds the daemon gets to end by itself
_BURIAL = 0.2  # seconds
_DAEMON_ENDED = (
    "the local libp2p daemon (p2pd), through which this process talks to the swarm, has ended: was it killed, or is "
    "this machine out of memory? Connect again to go on."
)


class SwarmConnection:
    """A libp2p daemon and a DHT node in an event loop of their own; a synchronous face over them.

    Use it as a context manager, or call close(): nothing here is left to the garbage collector.

        with SwarmConnection.connect(SwarmSettings(initial_peers=peers)) as connection:
            blocks = connection.remote_sequential("Llama-2-70b-hf", num_blocks=80)
    """

    def __init__(self, settings: SwarmSettings):
        self.settings = settings
        self.wires = WireBook(settings.wire)  # which servers take the lossy code of the settings
        self.caches = CacheBook()  # which have room for sessions
        self._portal_context = start_blocking_portal("asyncio", {"use_uvloop": True}, name="petals-eval")
        self._portal: BlockingPortal | None = None
        self._p2p: P2P | None = None
        self._dht: DHTNode | None = None
        self._background: list[Future[Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_lost = False
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, settings: SwarmSettings) -> "SwarmConnection":
        """Start the daemon and join the DHT as a client.

        Raises SwarmUnreachableError when no bootstrap peer answers or the clocks disagree.
        """
        bound_hivemind()
        connection = cls(settings)
        connection._portal = connection._portal_context.__enter__()
        atexit.register(connection.close)
        try:
            connection.run(connection._start)
            connection._background.append(connection._portal.start_task_soon(connection._watch_daemon))
        except BaseException:
            connection.close()
            raise
        return connection

    async def _start(self) -> None:
        peers = list(self.settings.initial_peers)
        try:
            with fail_after(self.settings.startup_timeout):
                # A client opens no port on the user's router and serves no strangers: no port mapping, no AutoNAT.
                self._p2p = await start_daemon(
                    initial_peers=peers,
                    dht_mode="client",
                    auto_nat=False,
                    nat_port_map=False,
                    no_listen=True,
                    host_maddrs=None,
                    startup_timeout=self.settings.startup_timeout,
                )
                self._dht = await DHTNode.create(p2p=self._p2p, initial_peers=peers, client_mode=True, num_workers=32)
        except ClockError as error:
            raise SwarmUnreachableError(
                f"the swarm's clock and this machine's differ by more than 3 s, so its DHT refuses us: {error}\n"
                "Set the clock (for example: timedatectl set-ntp true) and try again."
            ) from error
        except (P2PDaemonError, RuntimeError, OSError, TimeoutError) as error:
            # A daemon that could not start has just ended, and hivemind does not wait for it: let the loop bury it.
            await asyncio.sleep(_BURIAL)
            raise SwarmUnreachableError(
                "\n  ".join(["no initial peer answered:", *peers])
                + f"\nCheck the addresses and that one of them is up. ({type(error).__name__}: {error})"
            ) from error

    async def _watch_daemon(self) -> None:
        """Without the daemon no answer comes and nothing says so: end whatever waits for one."""
        await wait_until_lost(self.p2p)
        self._is_lost = True
        for task in self._tasks:
            task.cancel()

    async def _while_daemon_lives(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Raises SwarmError when the daemon ends first."""
        task = asyncio.current_task()
        if task is None or self._is_lost:
            raise SwarmError(_DAEMON_ENDED)
        self._tasks.add(task)
        try:
            return await function(*args)
        except asyncio.CancelledError:
            if not self._is_lost:
                raise
            task.uncancel()
            raise SwarmError(_DAEMON_ENDED) from None
        finally:
            self._tasks.discard(task)

    def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function in the connection's loop and wait; an interrupt here cancels it there."""
        future = self.start(function, *args)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, function: Callable[..., Awaitable[T]], *args: Any) -> "Future[T]":
        """Start a coroutine function in the connection's loop. Cancelling the future cancels it.

        Raises SwarmError after close(), and in the future when the daemon has ended; RuntimeError from within the
        loop itself: waiting there would never end.
        """
        if self._portal is None:
            raise SwarmError("the connection to the swarm is closed: connect again")
        return self._portal.start_task_soon(self._while_daemon_lives, function, *args)

    def start_background(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a coroutine function that runs until the connection is closed."""
        self._background.append(self.start(function, *args))

    @property
    def p2p(self) -> P2P:
        if self._p2p is None:
            raise SwarmError("the connection to the swarm is closed: connect again")
        return self._p2p

    @property
    def dht(self) -> DHTNode:
        if self._dht is None:
            raise SwarmError("the connection to the swarm is closed: connect again")
        return self._dht

    def remote_sequential(self, dht_prefix: str, num_blocks: int) -> "RemoteSequential":
        """The model's blocks as one module; reads the directory once, so that its state is known."""
        from petals_eval.swarm.remote_sequential import RemoteSequential

        return RemoteSequential.open(self, dht_prefix, num_blocks)

    def close(self) -> None:
        """End every task, the DHT node and the daemon. Safe to call twice."""
        with self._lock:
            portal, self._portal = self._portal, None
        if portal is None:
            return
        atexit.unregister(self.close)
        for task in self._background:
            task.cancel()
        try:
            portal.call(self._stop)
        finally:
            portal.call(portal.stop, True)
            self._portal_context.__exit__(None, None, None)

    async def _stop(self) -> None:
        if self._dht is not None:
            await self._dht.shutdown()
        if self._p2p is not None:
            await end_daemon(self._p2p, _SHUTDOWN_TIMEOUT)
        self._dht = self._p2p = None

    def __enter__(self) -> "SwarmConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

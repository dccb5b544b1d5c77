"""The connection to a swarm: the libp2p daemon and the DHT node, and the modules that are opened over them."""

import asyncio
import atexit
import time
from collections.abc import Sequence
from types import TracebackType

from anyio import fail_after
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError as ClockError
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from petals_eval.config import SwarmSettings
from petals_eval.errors import MissingBlocksError, SwarmError, SwarmUnreachableError
from petals_eval.swarm.directory.announced import announced_elsewhere, not_announced
from petals_eval.swarm.directory.dht import DhtSource, join_dht
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.remote_sequential import RemoteSequential
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon, wait_until_lost
from petals_eval.swarm.transport.libp2p import Libp2pTransport
from petals_eval.swarm.wire.msgpack_reader import bound_hivemind
from petals_eval.swarm.wire.span import Span

__all__ = ["SwarmConnection"]

_SHUTDOWN_TIMEOUT = 5.0  # seconds the daemon gets to end by itself
_CLOSED = "the connection to the swarm is closed: connect again"
_GIVE_NAME = ". Give the name that you mean with --dht-prefix (dht_prefix in Python)."
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

    def __init__(self, settings: SwarmSettings, loop: EventLoop):
        self.settings = settings
        self.loop = loop
        self._p2p: P2P | None = None
        self._dht: DHTNode | None = None

    @classmethod
    def connect(cls, settings: SwarmSettings) -> "SwarmConnection":
        """Start the daemon and join the DHT as a client.

        Raises SwarmUnreachableError when no bootstrap peer answers or the clocks disagree.
        """
        bound_hivemind()
        connection = cls(settings, EventLoop("petals-eval"))
        atexit.register(connection.close)
        try:
            connection.loop.run(connection._start)
            connection.loop.start_background(connection._watch_daemon)
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
                self._dht = await join_dht(self._p2p, peers)
        except ClockError as error:
            raise SwarmUnreachableError(
                f"the swarm's clock and this machine's differ by more than 3 s, so its DHT refuses us: {error}\n"
                "Set the clock (for example: timedatectl set-ntp true) and try again."
            ) from error
        except (P2PDaemonError, RuntimeError, OSError, TimeoutError) as error:
            raise SwarmUnreachableError(
                "\n  ".join(["no initial peer answered:", *peers])
                + f"\nCheck the addresses and that one of them is up. ({type(error).__name__}: {error})"
            ) from error

    async def _watch_daemon(self) -> None:
        """Without the daemon no answer comes and nothing says so: end whatever waits for one."""
        await wait_until_lost(self.p2p)
        self.loop.give_up(_DAEMON_ENDED)

    @property
    def p2p(self) -> P2P:
        """The libp2p daemon. Raises SwarmError after close()."""
        if self._p2p is None:
            raise SwarmError(_CLOSED)
        return self._p2p

    @property
    def dht(self) -> DHTNode:
        """The DHT node. Raises SwarmError after close()."""
        if self._dht is None:
            raise SwarmError(_CLOSED)
        return self._dht

    def remote_sequential(
        self, dht_prefix: str, num_blocks: int, other_prefixes: Sequence[str] = ()
    ) -> RemoteSequential:
        """Return the model's blocks as one module; its directory is read once, so that its state is known.

        other_prefixes: names that servers may have given the model, shown and never used where `dht_prefix` is not
        announced. Blocks that are missing are waited for; a name that nobody announces raises MissingBlocksError.
        """
        peers = PeerBook(self.settings)
        directory = Directory(DhtSource(self.dht), dht_prefix, num_blocks, peers)
        pipeline = Pipeline(Libp2pTransport(self.p2p, dht_prefix, peers), directory, peers)
        self.loop.run(directory.refresh)
        if not directory.is_announced:
            self.loop.run(self._explain_name, directory, other_prefixes)
        self.loop.start_background(directory.keep_fresh)
        return RemoteSequential(self.loop, pipeline, directory, Span(0, num_blocks))

    async def _explain_name(self, directory: Directory, other_prefixes: Sequence[str]) -> None:
        """Raise MissingBlocksError, which says what is announced here, unless another look finds the name.

        Where nothing at all is found the DHT may only be slow, so it is asked for as long as a server has to answer.
        """
        num_blocks = directory.snapshot.num_blocks
        until = time.monotonic() + self.settings.connect_timeout
        while True:
            found = await announced_elsewhere(self.dht, other_prefixes, num_blocks, self.settings.index_keys)
            # An index that has the name itself says that its blocks are there, or were: that is no other name to give.
            is_listed = any(model.prefix == directory.dht_prefix for model in found)
            found = [model for model in found if model.prefix != directory.dht_prefix]
            await directory.refresh()
            if directory.is_announced:
                return
            if (found and not is_listed) or time.monotonic() > until:
                said = not_announced(directory.dht_prefix, found)
                raise MissingBlocksError(f"{said}{_GIVE_NAME if found else ''}", ((0, num_blocks),))
            await asyncio.sleep(self.settings.missing_update_period)

    def close(self) -> None:
        """End every task, the DHT node and the daemon. Safe to call twice."""
        atexit.unregister(self.close)
        self.loop.close(self._stop)

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

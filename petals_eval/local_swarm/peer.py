"""A libp2p peer with a DHT node, opened and closed in one event loop."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from anyio import CancelScope
from hivemind.dht.node import DHTNode
from hivemind.p2p.p2p_daemon import P2P
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from petals_eval.errors import SwarmUnreachableError
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon

__all__ = ["Peer"]

_NOBODY_THERE = "failed to connect to bootstrap peers"  # the daemon's words
_LEAVE_TIMEOUT = 3.0
"""Seconds that the daemon may take to give back its DHT node's handlers, and then to end."""


class Peer:
    """A P2P daemon and the DHT node on it. Close it in the loop that opened it: the garbage collector cannot.

    maddrs: the addresses, with the peer id, that others connect to.
    """

    def __init__(self, p2p: P2P, node: DHTNode, maddrs: tuple[str, ...]):
        self.p2p = p2p
        self.node = node
        self.maddrs = maddrs

    @classmethod
    async def open(
        cls,
        initial_peers: Sequence[str] = (),
        *,
        host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce_maddrs: Sequence[str] = (),
        identity_path: str | None = None,
    ) -> "Peer":
        """Start a daemon, on loopback unless told otherwise, and join the DHT of `initial_peers`.

        Raises SwarmUnreachableError when none of them answers, and hivemind's errors for what this machine cannot do.
        """
        try:
            p2p = await start_daemon(
                initial_peers=list(initial_peers),
                host_maddrs=list(host_maddrs),
                announce_maddrs=list(announce_maddrs) or None,
                identity_path=identity_path,
                check_if_identity_free=False,
                # It is a local swarm: ask no router for anything.
                nat_port_map=False,
                auto_nat=False,
                use_relay=False,
            )
        except P2PDaemonError as error:
            if _NOBODY_THERE not in str(error):
                raise
            raise SwarmUnreachableError(
                "\n  ".join(["no initial peer answered:", *initial_peers])
                + "\nCheck the addresses and that one of them is up."
            ) from error
        try:
            node = await DHTNode.create(p2p=p2p, initial_peers=list(initial_peers) or None)
            maddrs = tuple(str(maddr) for maddr in await p2p.get_visible_maddrs())
        except BaseException:
            with CancelScope(shield=True):
                await end_daemon(p2p, _LEAVE_TIMEOUT)
            raise
        return cls(p2p, node, maddrs)

    @property
    def peer_id(self) -> str:
        return self.p2p.peer_id.to_base58()

    @property
    def is_alive(self) -> bool:
        """Whether its daemon runs."""
        return self.p2p._child is not None and self.p2p._child.returncode is None

    async def close(self) -> None:
        """Leave the DHT and end the daemon; does nothing the second time."""
        if not self.is_alive:
            await self.abort()
            return
        # A terminal sends Ctrl-C to the daemon, too: one that is about to end may never answer.
        with suppress(TimeoutError):
            await asyncio.wait_for(self.node.shutdown(), _LEAVE_TIMEOUT)
        self.node.is_alive = False
        await end_daemon(self.p2p, _LEAVE_TIMEOUT)

    async def abort(self) -> None:
        """End as a crashed peer does: the daemon is killed in mid-sentence."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                self.p2p._child.kill()
        self.node.is_alive = False
        await self.p2p.shutdown()  # not node.shutdown(): it would ask the daemon, and wait for ever

"""What a client costs, as the real server that it costs sees it: calls, connections, and cache reserved over time."""

import re
import threading
import time
from collections import Counter

import psutil

from tests.interop.real_petals import RealPetalsServer
from tests.support.wire_client import WireClient

_CALL = re.compile(r"\[INFO\] (rpc_\w+(?:\.open|\.close)?)\(blocks=\S+ remote_peer=\.\.\.(\w+)\)")


class ServerSide:
    """A context manager around what a client does with one server.

    reserved: tokens x seconds that sessions held, tokens being those of rpc_info (of one block). most_reserved: tokens
        at once. Both as seen by `observer`, a third party that asks every few milliseconds.
    calls: by method, of everybody but the observer; known at the end.
    """

    def __init__(self, server: RealPetalsServer, observer: WireClient):
        self._server = server
        self._observer = observer
        self._log_from = len(server.log())
        self._all = self._free()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._measure)
        self.reserved = 0.0
        self.most_reserved = 0
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> "ServerSide":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        own = self._observer.peer.peer_id[-6:]
        found = _CALL.findall(self._server.log()[self._log_from :])
        self.calls = Counter(method for method, peer in found if peer != own)

    def _free(self) -> int:
        return self._observer.info(self._server.peer_id)["cache_tokens_available"]

    def _measure(self) -> None:
        before, last = time.monotonic(), 0
        while not self._ended.is_set():
            reserved = self._all - self._free()
            now = time.monotonic()
            self.reserved += (now - before) * (reserved + last) / 2
            self.most_reserved = max(self.most_reserved, reserved)
            before, last = now, reserved
            time.sleep(0.002)


def ports_of(daemon: int) -> set[int]:
    """The TCP ports of a client's libp2p daemon (process id)."""
    return {each.laddr.port for each in psutil.Process(daemon).net_connections("tcp")}


def connections_from(ports: set[int], server: RealPetalsServer) -> int:
    """Connections that a server has with these ports now."""
    return sum(
        bool(each.raddr) and each.raddr.port in ports and each.status == psutil.CONN_ESTABLISHED
        for process in server.processes()
        for each in psutil.Process(process).net_connections("tcp")
    )

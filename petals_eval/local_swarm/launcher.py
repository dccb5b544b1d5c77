"""A whole swarm on this machine, for tests, demos and benchmarks."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Literal

from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import ValidationError

from petals_eval.config import checked_peers
from petals_eval.errors import ConfigError, ModelError
from petals_eval.local_swarm.fork_server import ForkServer
from petals_eval.local_swarm.handles import LocalServer, ProcessServer, ThreadServer
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.model.dht_prefixes import default_prefix
from petals_eval.model.families import Family, family_of, text_config
from petals_eval.model.sources import Folder, Source, open_source
from petals_eval.swarm.wire.span import Span
from petals_eval.validation import SETTINGS, explain

if TYPE_CHECKING:
    from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile
    from petals_eval.local_swarm.peer import Peer

__all__ = ["LocalSwarm", "split_evenly"]

_BOOTSTRAP_TIMEOUT = 30.0
"""Seconds that the launcher's own node may take to start, and to end."""
_POLL_PERIOD = 0.2  # seconds


class LocalSwarm:
    """Block servers over a model, on loopback, with a DHT node of the launcher's own as the swarm's address.

    Or, with `initial_peers`, more servers of a swarm that is there already.

    A context manager; `start` and `stop` do the same by hand.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        servers: int = 3,
        spans: Sequence[Span | tuple[int, int]] | None = None,
        dht_prefix: str | None = None,
        initial_peers: str | Sequence[str] = (),
        mode: Literal["process", "thread"] = "process",
        network: "EmulatedNetwork | None" = None,
        links: "LinkProfile | Sequence[LinkProfile] | None" = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        startup_timeout: float = 120.0,
        **options: Any,
    ):
        """
        model: a local folder, or the name of a repository of the hub with its revision, token and cache.
        servers: how many, the blocks split evenly among them; or else
        spans: the blocks (start, stop) of each server. They may overlap, and the same span may come twice.
        dht_prefix: what the blocks are announced under; by default the folder's name, or Petals' rule for a repository.
        initial_peers: addresses of the swarm that the servers join, as `checked_peers` takes them; empty: they are a
            swarm of their own.
        mode: "process": killable, and each with a processor of its own; "thread": quicker to start.
        network: put a relay of this network, which must be running, before each server and before the bootstrap peer.
        links: the link of each server, or one profile for all of them; None: free ones. The bootstrap peer's has the
            first one's delay.
        startup_timeout: seconds until all servers must serve.
        options: any other field of `ServerSettings`, for all servers: dtype, throughput, max_batch_size, adapters, ...

        Raises ModelError when the folder holds no model the stub knows, ConfigError for impossible settings.
        """
        self.model = str(model)
        source = open_source(self.model, revision=revision, token=token, cache_dir=cache_dir, error=ModelError)
        family, self.num_blocks = _read_config(source)
        self._model_type = family.model_type
        self.dht_prefix = dht_prefix or _default_prefix(source, family)
        self.mode = mode
        self._startup_timeout = startup_timeout
        cache = None if cache_dir is None else str(cache_dir)
        self._options = {**options, "revision": source.revision or revision, "token": token, "cache_dir": cache}
        # A wrong setting shows now, before anything is started.
        chosen = split_evenly(self.num_blocks, servers) if spans is None else spans
        self._planned = [self._settings(span, {}) for span in chosen]
        self._network = network
        self._links = _links(links, len(self._planned), network)
        self.servers: list[LocalServer] = []
        self.initial_peers = list(checked_peers(initial_peers))
        self._portal: BlockingPortal | None = None
        self._fork_server: ForkServer | None = None
        self._ending = ExitStack()  # what ends what has been started, the last thing first

    def start(self) -> "LocalSwarm":
        """Start all servers and wait until they serve; raises ModelError or MachineError when one cannot."""
        if self._portal is not None:
            raise ConfigError("expected a local swarm that has not been started, found one that has: make another")
        deadline = time.monotonic() + self._startup_timeout
        try:
            if self.mode == "process":
                self._fork_server = ForkServer(self._model_type)  # first: its imports take longest
                self._ending.callback(self._fork_server.close)
            portal = self._portal = self._ending.enter_context(start_blocking_portal("asyncio", name="local swarm"))
            self._ending.callback(portal.call, portal.stop, True)  # without waiting for what still runs there
            if not self.initial_peers:
                bootstrap = portal.start_task_soon(self._open_bootstrap).result(_BOOTSTRAP_TIMEOUT)
                self._ending.callback(lambda: portal.start_task_soon(bootstrap.close).result(_BOOTSTRAP_TIMEOUT))
                self.initial_peers = list(bootstrap.maddrs)
            self._ending.callback(self._stop_servers)
            for settings, link in zip(self._planned, self._links, strict=True):
                self.servers.append(self._launch(settings, link, portal, deadline))
            for server in self.servers:
                server.wait_ready(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def add_server(
        self, span: Span | tuple[int, int], *, link: "LinkProfile | None" = None, **options: Any
    ) -> LocalServer:
        """Start one more server for blocks (start, stop) and wait until it serves.

        link: its own in the emulated network; None: the first server's. options: they go before the swarm's own.
        """
        if self._portal is None:
            raise ConfigError("expected a local swarm that runs, found one that does not: start it first")
        deadline = time.monotonic() + self._startup_timeout
        server = self._launch(self._settings(span, options), link or self._links[0], self._portal, deadline)
        self.servers.append(server)
        server.wait_ready(deadline)
        return server

    def wait(self) -> LocalServer:
        """Block until a server has ended, and return it; Ctrl-C interrupts."""
        while True:
            for server in self.servers:
                if not server.is_alive():
                    return server
            time.sleep(_POLL_PERIOD)

    def stop(self) -> None:
        """End everything, in order; does nothing the second time. Whatever fails, the rest ends too."""
        self._ending.close()

    def _stop_servers(self) -> None:
        for server in self.servers:
            server.request_stop()  # all at once, then wait for each
        with ExitStack() as ending:
            for server in self.servers:
                ending.callback(server.stop)

    def __enter__(self) -> "LocalSwarm":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _open_bootstrap(self) -> "Peer":
        from petals_eval.local_swarm.peer import Peer

        if self._network is None:
            return await Peer.open()
        link = self._links[0]
        free = None if link is None else replace(link, up_mbps=None, down_mbps=None)
        relay, listen = _behind_relay(self._network, free)
        return await Peer.open(host_maddrs=[listen], announce_maddrs=[relay])

    def _launch(
        self, settings: ServerSettings, link: "LinkProfile | None", portal: BlockingPortal, deadline: float
    ) -> LocalServer:
        settings = settings.model_copy(update={"initial_peers": tuple(self.initial_peers)})
        if self._network is not None:
            relay, listen = _behind_relay(self._network, link)
            settings = settings.model_copy(update={"host_maddrs": (listen,), "announce_maddrs": (relay,)})
        if self._fork_server is not None:
            return ProcessServer(settings, self._fork_server, deadline)
        return ThreadServer(settings, portal)

    def _settings(self, span: Span | tuple[int, int], options: dict[str, Any]) -> ServerSettings:
        start, stop = span if isinstance(span, tuple) else (span.start, span.stop)
        if not 0 <= start < stop <= self.num_blocks:
            raise ConfigError(f"expected spans within 0:{self.num_blocks}, the model's blocks, found {start}:{stop}")
        fields = {"model": self.model, "dht_prefix": self.dht_prefix, "start": start, "stop": stop}
        try:
            return ServerSettings(**{**self._options, **options, **fields})
        except ValidationError as error:
            raise ConfigError(f"local swarm: {explain(error, ServerSettings, SETTINGS)}") from error


def _links(
    links: "LinkProfile | Sequence[LinkProfile] | None", servers: int, network: "EmulatedNetwork | None"
) -> "Sequence[LinkProfile | None]":
    """Return one link for each server."""
    if links is not None and network is None:
        raise ConfigError("links are those of an emulated network: give network=, too")
    if not isinstance(links, Sequence):
        return [links] * servers
    if len(links) != servers:
        raise ConfigError(f"expected one link for all servers or {servers}, one each, found {len(links)}")
    return links


def _behind_relay(network: "EmulatedNetwork", link: "LinkProfile | None") -> tuple[str, str]:
    """Open a relay; return its address, which a server must announce, and the one where that must listen."""
    from petals_eval.local_swarm.network import LinkProfile

    relay, listen = network.before_server(link or LinkProfile())
    return relay.maddr, listen


def split_evenly(num_blocks: int, servers: int) -> tuple[Span, ...]:
    """Return spans of consecutive blocks, the longer ones first.

    >>> [str(span) for span in split_evenly(5, 3)]
    ['0:2', '2:4', '4:5']
    """
    if not 1 <= servers <= num_blocks:
        raise ConfigError(
            f"expected 1 to {num_blocks} servers for {num_blocks} blocks, found {servers}: replicas are given as spans"
        )
    each, longer = divmod(num_blocks, servers)
    starts = [each * server + min(server, longer) for server in range(servers + 1)]
    return tuple(map(Span, starts, starts[1:]))


def _default_prefix(source: Source, family: Family) -> str:
    """Return the prefix by Petals' rule for a repository; a folder has only its own name."""
    if isinstance(source, Folder):
        return source.name.replace(".", "-").replace(" ", "-")
    return default_prefix(family.model_type, source.name)


def _read_config(source: Source) -> tuple[Family, int]:
    """Read the family and the number of blocks without the seconds that importing transformers takes."""
    path = source.find("config.json")
    if path is None:
        raise ModelError(f"{source} has no config.json; expected a model in Hugging Face's format.")
    try:
        config = SimpleNamespace(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a model's config: {error}") from error
    family, config = family_of(config), text_config(config)
    num_blocks = getattr(config, family.blocks_field, None) or getattr(config, "n_layer", None)  # BLOOM's own name
    if not isinstance(num_blocks, int):
        raise ModelError(f"{path}: expected {family.blocks_field}, a number of blocks, found {num_blocks!r}")
    return family, num_blocks

"""What is measured: the blocks of a model on a swarm, and the processes and links around them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from petals_eval.bench.settings import BenchSettings, InferenceSettings, Wire
from petals_eval.config import PUBLIC_SWARM, SwarmSettings
from petals_eval.errors import ConfigError
from petals_eval.model import Checkpoint
from petals_eval.model.dht_prefixes import other_prefixes
from petals_eval.model.rotary import RotaryScaling, rotary_scaling
from petals_eval.remote_model import default_dht_prefix

if TYPE_CHECKING:
    from petals_eval.local_swarm.network import EmulatedNetwork, LinkUse
    from petals_eval.swarm import RemoteSequential

__all__ = ["BenchTarget", "open_target", "with_wire"]


@dataclass(frozen=True, eq=False)
class BenchTarget:
    """The blocks, and where to look while they work.

    model: its name, never a path. client: ids of this process and of its libp2p daemon.
    server_processes: peer id -> process id of a local swarm's servers; a server's daemon is its child.
    network: before a local swarm's servers, or None.
    """

    model: str
    hidden_size: int
    blocks: "RemoteSequential"
    client: tuple[int, ...]
    server_processes: dict[str, int]
    network: "EmulatedNetwork | None"

    def link_use(self) -> "list[LinkUse]":
        """Return what each link has carried so far; empty where links are not known."""
        return [] if self.network is None else self.network.use()[0]


@contextlib.contextmanager
def open_target(settings: BenchSettings) -> Iterator[BenchTarget]:
    """Connect to the swarm of the settings; an embedded one runs until the end.

    Raises ModelError, ConfigError, SwarmUnreachableError, MissingBlocksError where nobody announces the model.
    """
    from petals_eval.swarm import SwarmConnection

    token = settings.hub_token
    checkpoint = Checkpoint.open(settings.model, revision=settings.revision, token=token)
    rotary = rotary_scaling(checkpoint.config)
    _spare_servers(settings, rotary)
    with contextlib.ExitStack() as stack:
        network = None
        processes: dict[str, int] = {}
        if settings.local_swarm is None:
            peers = settings.initial_peers or PUBLIC_SWARM
            prefix = settings.dht_prefix or default_dht_prefix(settings.model, checkpoint.family)
        else:
            from petals_eval.local_swarm import LocalSwarm
            from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile

            links: dict[str, Any] = {}
            if settings.delay is not None or settings.rate is not None:
                network = stack.enter_context(EmulatedNetwork())
                delay, rate = (settings.delay or 0.0) / 1000, settings.rate
                profile = LinkProfile(delay=delay, up_mbps=rate, down_mbps=rate)
                links = {"network": network, "links": profile}
            swarm = stack.enter_context(
                LocalSwarm(
                    settings.model,
                    servers=settings.local_swarm,
                    dht_prefix=settings.dht_prefix,
                    revision=settings.revision,
                    token=token,
                    **links,
                )
            )
            peers, prefix = tuple(swarm.initial_peers), swarm.dht_prefix
            processes = {server.peer_id: server.pid for server in swarm.servers}
        children = _children()
        connection = stack.enter_context(SwarmConnection.connect(SwarmSettings.of(settings, initial_peers=peers)))
        others = other_prefixes(checkpoint.family.model_type, checkpoint.name, prefix)
        blocks = connection.remote_sequential(prefix, checkpoint.family.num_blocks(checkpoint.config), others)
        blocks.limit_steps(rotary.original_length)
        yield BenchTarget(
            model=checkpoint.name,
            hidden_size=checkpoint.family.hidden_size(checkpoint.config),
            blocks=blocks,
            client=(os.getpid(), *(_children() - children)),
            server_processes=processes,
            network=network,
        )


@contextlib.contextmanager
def with_wire(target: BenchTarget, wire: Wire) -> Iterator[BenchTarget]:
    """The same blocks with hidden states over this wire: on a connection of their own unless it is lossless."""
    if wire == "lossless":
        yield target
        return
    from petals_eval.swarm import SwarmConnection

    children = _children()
    with SwarmConnection.connect(target.blocks.settings.model_copy(update={"wire": wire})) as connection:
        blocks = connection.remote_sequential(target.blocks.dht_prefix, len(target.blocks))
        yield replace(target, blocks=blocks, client=(os.getpid(), *(_children() - children)))


def _spare_servers(settings: BenchSettings, rotary: RotaryScaling) -> None:
    """Raise ConfigError for lengths that would change what servers answer to everybody, from then on."""
    longest = max(settings.lengths) + (settings.new_tokens if isinstance(settings, InferenceSettings) else 0)
    if rotary.remembers_calls and rotary.original_length is not None and longest > rotary.original_length:
        raise ConfigError(
            f"lengths: expected at most {rotary.original_length} positions, found {longest}: this model's rotary "
            "embeddings are scaled dynamically (rope_type dynamic), and a server that was sent a longer row answers "
            "everybody otherwise afterwards."
        )


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}

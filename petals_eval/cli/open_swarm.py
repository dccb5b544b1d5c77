"""Open what a command works with: the swarm that its settings name, and the model over it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import typer

from petals_eval.config import PUBLIC_SWARM, RunSettings
from petals_eval.errors import ConfigError
from petals_eval.remote_model import RemoteModel
from petals_eval.text import plural

__all__ = ["chosen_swarm", "local_options", "open_model", "whom_to_use"]

STRANGERS = "note: on the public swarm, strangers' machines see the activations of these examples."


@contextlib.contextmanager
def chosen_swarm(settings: RunSettings) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """The bootstrap peers and the DHT prefix of the swarm the settings name; an embedded one runs until the end."""
    if settings.local_swarm is None:
        if settings.public_swarm:
            typer.echo(STRANGERS, err=True)
        yield settings.initial_peers or PUBLIC_SWARM, settings.dht_prefix
        return
    from petals_eval.local_swarm import LocalSwarm

    token = settings.token.get_secret_value() if settings.token else None
    with LocalSwarm(
        settings.model,
        servers=settings.local_swarm,
        dht_prefix=settings.dht_prefix,
        revision=settings.revision,
        token=token,
    ) as swarm:
        spans = " ".join(f"{server.span[0]}:{server.span[1]}" for server in swarm.servers)
        typer.echo(
            f"local swarm: {plural(len(swarm.servers), 'server')}, blocks {spans}, peers {swarm.initial_peers[0]}",
            err=True,
        )
        yield tuple(swarm.initial_peers), swarm.dht_prefix


@contextlib.contextmanager
def open_model(settings: RunSettings) -> Iterator[RemoteModel]:
    """The model over the chosen swarm, connected until the end."""
    with (
        chosen_swarm(settings) as (initial_peers, dht_prefix),
        RemoteModel.from_pretrained(
            settings.model,
            adapter=settings.adapter,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            **whom_to_use(settings),
            verify=settings.verify,
            verify_local=settings.verify_local,
            deadline=settings.deadline,
            request_timeout=settings.request_timeout,
            window=settings.window,
            max_tokens_per_call=settings.max_tokens_per_call,
            wire=settings.wire,
            push=settings.push,
            **local_options(settings),
        ) as model,
    ):
        yield model


def whom_to_use(settings: RunSettings) -> dict[str, Any]:
    """The choice of servers, as SwarmSettings names it."""
    return {
        "active_adapter": settings.active_adapter,
        "require_dtype": settings.require_dtype,
        "require_quant": settings.require_quant,
        "allow_servers": settings.allow_server,
        "deny_servers": settings.deny_server,
        "allow_nondeterministic": settings.allow_nondeterministic,
    }


def local_options(settings: RunSettings) -> dict[str, Any]:
    """How the local part is loaded. Raises ConfigError for a device that this machine or this torch does not have."""
    import torch

    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected one that torch can use here, found {settings.device!r}: {reason}"
        ) from error
    return {
        "revision": settings.revision,
        "token": settings.token.get_secret_value() if settings.token else None,
        "dtype": None if settings.dtype is None else getattr(torch, settings.dtype),
        "device": settings.device,
        "pool": settings.pool,
    }

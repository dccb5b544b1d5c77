"""The model and the swarm that the harness's `--model_args` name."""

import logging
from contextlib import ExitStack
from typing import Any

from petals_eval.config import PUBLIC_SWARM, STRANGERS, SwarmSettings
from petals_eval.integrations.lm_eval.settings import BackendSettings
from petals_eval.remote_model import RemoteModel

__all__ = ["opened_model"]

_log = logging.getLogger("petals_eval")


def opened_model(settings: BackendSettings) -> tuple[RemoteModel, ExitStack]:
    """Return the model that the settings name, connected, and what has to be closed after it.

    Raises as `RemoteModel.from_pretrained` does.
    """
    source: dict[str, Any] = {"revision": settings.revision, "token": settings.hub_token}
    with ExitStack() as opened:
        peers, prefix = settings.initial_peers, settings.dht_prefix
        if settings.local_swarm is not None:
            from petals_eval.local_swarm import LocalSwarm

            embedded = LocalSwarm(settings.model, servers=settings.local_swarm, dht_prefix=prefix, **source)
            swarm = opened.enter_context(embedded)
            peers, prefix = tuple(swarm.initial_peers), swarm.dht_prefix
        elif settings.public_swarm:
            _log.warning(STRANGERS)
            peers = PUBLIC_SWARM
        model = RemoteModel.from_pretrained(
            settings.model,
            adapter=settings.adapter,  # type: ignore[arg-type]  # names stand in pairs with their places there
            adapter_task=settings.adapter_task,
            dht_prefix=prefix,
            dtype=settings.dtype,
            device=settings.device,
            verify_local=settings.verify_local,
            **source,
            **dict(SwarmSettings.of(settings, initial_peers=peers)),
        )
        opened.enter_context(model)
        return model, opened.pop_all()

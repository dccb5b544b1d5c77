"""The model and the swarm that the arguments of a harness name."""

import logging
from contextlib import ExitStack
from typing import Annotated, Any

from pydantic import Field, model_validator

from petals_eval.config import (
    PUBLIC_SWARM,
    STRANGERS,
    AdapterPlaces,
    Blocks,
    CallSettings,
    ModelOnSwarm,
    RunSettings,
    SwarmSettings,
    same_as,
)
from petals_eval.remote_model import RemoteModel

__all__ = ["SwarmModelSettings", "opened_model"]

_log = logging.getLogger("petals_eval")

_SEVERAL = ("initial_peers", "allow_servers", "deny_servers", "index_keys")
_SEPARATOR = "+"
"""Between several values of one argument: harnesses cut their text at commas, a shell at blanks and semicolons, and no
multiaddress holds it."""


class SwarmModelSettings(ModelOnSwarm, CallSettings):
    """The model, its prompts, the swarm, and how it is used.

    Several peers, servers or keys are a list, or one text with `+` between them. `peft`, as others call it, means
    `adapter`.
    """

    adapter: AdapterPlaces = same_as(RunSettings, "adapter")
    adapter_task: Annotated[int, Field(ge=0)] | None = same_as(RunSettings, "adapter_task")
    dtype: str | None = same_as(RunSettings, "dtype")  # torch's other names for one, too
    device: str = same_as(RunSettings, "device")
    verify_local: Blocks | None = same_as(RunSettings, "verify_local")

    @model_validator(mode="before")
    @classmethod
    def _separated(cls, values: Any) -> Any:
        split = {name: values[name].split(_SEPARATOR) for name in _SEVERAL if isinstance(values.get(name), str)}
        renamed = {"adapter" if name == "peft" and "adapter" not in values else name: values[name] for name in values}
        return renamed | split

    @model_validator(mode="after")
    def _one_adapter(self) -> "SwarmModelSettings":
        if len(self.adapter) > 1:
            raise ValueError(f"adapter: expected one, for the harness shows one model, found {len(self.adapter)}")
        return self


def opened_model(settings: SwarmModelSettings) -> tuple[RemoteModel, ExitStack]:
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

"""What `petals-eval modes` is told."""

from typing import Annotated

from pydantic import Field

from petals_eval.config import (
    MODEL,
    OUTPUT,
    SWARM,
    TASK,
    AdapterPlaces,
    Names,
    OwnPlace,
    Peers,
    Place,
    Positive,
    RunSettings,
    Settings,
    SwarmSettings,
    TaskSettings,
    option,
    same_as,
)

__all__ = ["ModesSettings"]


class ModesSettings(Settings, heading=MODEL):
    """A model whose blocks run at home, or the servers of a swarm; and what is asked."""

    model: Place | None = option(None, "Hub name or local folder of a model whose blocks run at home.", "NAME")
    revision: str | None = option(None, "Revision of the model on the hub.", "REV")
    adapter: AdapterPlaces = same_as(RunSettings, "adapter", heading=MODEL)
    task: Place | None = option(None, "Task for a trained head: its rows are the evaluation set.", "TASK", heading=TASK)
    data: Place | None = same_as(TaskSettings, "data", heading=TASK)
    limit: Positive | None = same_as(TaskSettings, "limit", heading=TASK)
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = option(
        None, "Dropout of the blocks, to see what it would do.", "P", unset="what the config says", heading=MODEL
    )
    text: str = option(
        "This film was a waste of two hours", "The text that is answered without a task.", "TEXT", heading=OUTPUT
    )
    answers: Annotated[int, Field(ge=2)] = option(5, "Answers in each mode.", heading=OUTPUT)
    seed: int = option(0, "Seed of the answers in training mode.", "S", heading=OUTPUT)
    initial_peers: Peers = same_as(SwarmSettings, "initial_peers", default=(), heading=SWARM)
    models: Names = option((), "Name the servers announce.", "NAME...", unset="all", flag="--dht-prefix", heading=SWARM)
    out: OwnPlace | None = option(None, "Also write a page that shows it.", "FILE", heading=OUTPUT)
    json_output: bool = option(False, "Print JSON alone on stdout.", flag="--json", alias="json", heading=OUTPUT)

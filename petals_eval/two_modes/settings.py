"""What `petals-eval modes` is told."""

from typing import Annotated

from pydantic import Field

from petals_eval.config import MODEL, OUTPUT, SWARM, Names, Peers, Place, Settings, SwarmSettings, option, same_as

__all__ = ["ModesSettings"]


class ModesSettings(Settings, heading=MODEL):
    """A model whose blocks run at home, or the servers of a swarm; and what is asked."""

    model: Place | None = option(None, "Hub name or local folder of a model whose blocks run at home.", "NAME")
    revision: str | None = option(None, "Revision of the model on the hub.", "REV")
    text: str = option("This film was a waste of two hours.", "The text that is answered.", "TEXT", heading=OUTPUT)
    answers: Annotated[int, Field(ge=2)] = option(5, "Answers in each mode.", heading=OUTPUT)
    seed: int = option(0, "Seed of the answers in training mode.", "S", heading=OUTPUT)
    initial_peers: Peers = same_as(SwarmSettings, "initial_peers", default=(), heading=SWARM)
    models: Names = option((), "Name the servers announce.", "NAME...", unset="all", flag="--dht-prefix", heading=SWARM)
    json_output: bool = option(False, "Print JSON alone on stdout.", flag="--json", alias="json", heading=OUTPUT)

"""What a benchmark is told: which swarm, and what to sweep over."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from petals_eval.config import (
    SWARM,
    SWEEP,
    CallSettings,
    ModelOnSwarm,
    Positive,
    Seconds,
    ServerChoice,
    option,
    same_as,
)
from petals_eval.config import Wire as LossyWire

__all__ = ["BenchSettings", "ForwardSettings", "InferenceSettings", "Wire"]

Wire = Literal["lossless"] | LossyWire
"""How hidden states travel."""


def _numbers(value: object) -> object:
    """Split numbers in one text at its commas, as they are typed after a flag."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _auto(value: object) -> object:
    """Take "auto" for None: what the client chooses by itself."""
    values = _numbers(value)
    return [None if each == "auto" else each for each in values] if isinstance(values, list | tuple) else values


AtLeastOne = Field(min_length=1)
Numbers = Annotated[tuple[Positive, ...], BeforeValidator(_numbers), AtLeastOne]
Windows = Annotated[tuple[Positive | None, ...], BeforeValidator(_auto), AtLeastOne]
NotNegative = Annotated[float, Field(ge=0)]


class BenchSettings(ModelOnSwarm, ServerChoice, heading=SWEEP):
    """The swarm, and what both benchmarks sweep over: every combination of the values is a point.

    Of the model only its config is read.
    """

    delay: NotNegative | None = option(None, "Delay of embedded servers' links one way, in ms.", "MS", heading=SWARM)
    rate: Annotated[float, Field(gt=0)] | None = option(
        None, "Rate of embedded servers' links each way, in Mbit/s.", "MBIT", heading=SWARM
    )
    deadline: Seconds = same_as(CallSettings, "deadline", default=60.0)

    lengths: Numbers = option((32, 128, 512), "Positions of a row.", "N,N,...")
    batches: Numbers = option((1, 8), "Rows together, in a micro-batch or session.", "N,N,...")
    repeats: Positive = option(3, "Runs of each combination.")
    prompts: Annotated[int, Field(ge=0)] = option(0, "Deep prompts of this many positions of a row.")

    @model_validator(mode="after")
    def _links_of_our_own(self) -> "BenchSettings":
        if self.local_swarm is None and (self.delay is not None or self.rate is not None):
            raise ValueError("--delay and --rate are those of an embedded swarm's links: they go with --local-swarm")
        return self


class ForwardSettings(BenchSettings, heading=SWEEP):
    """Many micro-batches in flight along the route, as an evaluation sends them."""

    windows: Windows = option((None,), "Micro-batches in flight; auto: the client's choice.", "N,N,...")
    wires: Annotated[tuple[Wire, ...], BeforeValidator(_numbers), AtLeastOne] = option(
        ("lossless",), "How hidden states travel: lossless, float16, blockwise8, uniform8.", "NAME,..."
    )
    seconds: Seconds = option(3.0, "Length of each run.")
    warm_up: NotNegative = option(1.0, "Warming up before each combination.")


class InferenceSettings(BenchSettings, heading=SWEEP):
    """Sessions: one step over a prompt, then one position after the other."""

    windows: Numbers = option((1,), "Sessions at once.", "N,N,...")
    wires: Annotated[tuple[Literal["lossless"], ...], BeforeValidator(_numbers), AtLeastOne] = option(
        ("lossless",), "How hidden states travel; lossless only.", "NAME,..."
    )
    new_tokens: Positive = option(16, "Steps after the prompt's.")

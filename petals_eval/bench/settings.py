"""What a benchmark is told: which swarm, and what to sweep over."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from petals_eval.config import Dtype, Names, Peers, Seconds, Settings

__all__ = ["BenchSettings", "ForwardSettings", "InferenceSettings", "Wire"]

Wire = Literal["lossless", "float16", "blockwise8", "uniform8"]  # how hidden states travel


def _numbers(value: object) -> object:
    """Numbers in one text, apart by commas, as they are typed after a flag."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _auto(value: object) -> object:
    """ "auto" is what the client chooses by itself."""
    values = _numbers(value)
    return [None if each == "auto" else each for each in values] if isinstance(values, list | tuple) else values


Positive = Annotated[int, Field(gt=0)]
Numbers = Annotated[tuple[Positive, ...], BeforeValidator(_numbers), Field(min_length=1)]
Windows = Annotated[tuple[Positive | None, ...], BeforeValidator(_auto), Field(min_length=1)]


class BenchSettings(Settings):
    """The swarm, and what both benchmarks sweep over: every combination of the values is a point."""

    model: str  # hub name or local folder: only its config is read
    revision: str | None = None  # of the model on the hub
    token: SecretStr | None = None  # for gated repositories

    initial_peers: Peers = ()  # bootstrap peers
    public_swarm: bool = False  # the public Petals swarm
    local_swarm: int | None = Field(default=None, gt=0)  # servers of an embedded swarm on this machine
    delay: float | None = Field(default=None, ge=0)  # of its links one way, in ms
    rate: float | None = Field(default=None, gt=0)  # of its links each way, in Mbit/s
    dht_prefix: str | None = None  # the name servers announce; None: Petals' rule for the hub name
    active_adapter: str | None = None  # LoRA adapter on the servers
    require_dtype: Dtype | None = None  # what servers must compute in
    require_quant: str | None = None  # how servers must quantise: "none", "int8" or "nf4"
    allow_server: Names = ()  # use only these servers: identities, whole or their last letters
    deny_server: Names = ()  # leave these out
    deadline: Seconds = 60.0  # seconds to wait for a server, per hop

    lengths: Numbers = (32, 128, 512)  # positions of a row
    batches: Numbers = (1, 8)  # rows of a micro-batch or session
    repeats: int = Field(default=3, gt=0)  # runs of each point
    prompts: int = Field(default=0, ge=0)  # deep prompts' tokens, within `lengths`

    @model_validator(mode="after")
    def _one_swarm(self) -> "BenchSettings":
        chosen = [bool(self.initial_peers), self.public_swarm, self.local_swarm is not None]
        if sum(chosen) != 1:
            raise ValueError(
                "expected exactly one swarm: --initial-peers MADDR, --public-swarm, or --local-swarm N for one that is "
                f"embedded; found {sum(chosen)} of them"
            )
        if self.local_swarm is None and (self.delay is not None or self.rate is not None):
            raise ValueError("--delay and --rate are those of an embedded swarm's links: they go with --local-swarm")
        return self


class ForwardSettings(BenchSettings):
    """Many micro-batches in flight along the route, as an evaluation sends them."""

    windows: Windows = (None,)  # micro-batches in flight; None: the client's own choice
    wires: Annotated[tuple[Wire, ...], BeforeValidator(_numbers), Field(min_length=1)] = ("lossless",)
    seconds: Seconds = 3.0  # of each run
    warm_up: float = Field(default=1.0, ge=0)  # seconds before the first run of each point


class InferenceSettings(BenchSettings):
    """Sessions: one step over a prompt, then one position after the other."""

    windows: Annotated[tuple[Positive, ...], BeforeValidator(_numbers), Field(min_length=1)] = (1,)  # sessions at once
    wires: Annotated[tuple[Literal["lossless"], ...], BeforeValidator(_numbers), Field(min_length=1)] = ("lossless",)
    new_tokens: int = Field(default=16, gt=0)  # steps after the prompt's

"""What one server of the local swarm is told: every default in one place, each with its unit."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from petals_eval.local_swarm.faults.catalog import AnyFault, TrainingMode
from petals_eval.swarm.wire.records import MODEL_INDEX_KEYS
from petals_eval.swarm.wire.span import Span

__all__ = ["ServerSettings"]


class ServerSettings(BaseModel):
    """Settings of one server, which travel to its process as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # a local folder, or a repository of the hub
    revision: str | None = None  # of the repository
    token: str | None = Field(default=None, repr=False)
    cache_dir: str | None = None
    dht_prefix: str
    index_key: str = MODEL_INDEX_KEYS[0]  # of the DHT, under which it announces the model
    start: int = Field(ge=0)  # the first of its blocks
    stop: int  # the block after its last one
    initial_peers: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: the checkpoint's

    # How it computes in its dtype: as torch does; with nothing rounded between the layers, as fused kernels do; or
    # float32 with the matrix products of TF32.
    arithmetic: Literal["plain", "fused", "tf32"] = "plain"

    # Tokens a second through all of its blocks, which are then no arithmetic but a wait (`paced_span`), and seconds
    # that a call takes beside them; None: it computes.
    pace: float | None = Field(default=None, gt=0)
    call_seconds: float = Field(default=0.002, ge=0)

    throughput: float | None = Field(default=None, ge=0)  # tokens per second, as announced; None: as measured
    public_name: str | None = None
    version: str = "2.3.0.dev2"  # the line of Petals whose wire this server speaks
    # LoRA adapters it announces and accepts. It applies none: calls that name one are computed without.
    adapters: tuple[str, ...] = ()
    update_period: float = Field(default=120.0, gt=0)  # seconds between announcements; they live for two of these

    max_batch_size: int = Field(default=2048, ge=1)  # tokens (batch x seq) of a call
    inference_max_length: int | None = Field(default=None, ge=1)  # tokens of a session; None: max_batch_size
    # Tokens of all sessions together; None: twice inference_max_length.
    attn_cache_tokens: int | None = Field(default=None, ge=1)
    max_chunk_bytes: int = Field(default=256 * 2**20, ge=1)  # of attention weights at once in a session's step
    max_alloc_timeout: float = Field(default=600.0, ge=0)  # seconds a session may wait for room in the cache

    # Whether sessions honour start_from_position, as 2.3.0 servers do; 2.2.0 servers ignore it and go on appending.
    rolls_back: bool = True

    # Whether the code BLOCKWISE_8BIT is taken and given: hivemind leaves it to bitsandbytes. This server has its own.
    has_bitsandbytes: bool = True

    # What is wrong with it from the start; `LocalServer.switch` changes that. dropout: short for TrainingMode.
    faults: tuple[AnyFault, ...] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)

    request_timeout: float = Field(default=180.0, gt=0)  # seconds
    session_timeout: float = Field(default=1800.0, gt=0)  # seconds
    step_timeout: float = Field(default=300.0, gt=0)  # seconds between two steps of a session

    threads: int = Field(default=1, ge=1)  # of arithmetic, in a process of its own

    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()  # where others are told to connect, such as an emulated link; default: there
    identity_path: str | None = None  # file of the libp2p key; None: a new identity

    @model_validator(mode="after")
    def _check(self) -> "ServerSettings":
        if self.stop <= self.start:
            raise ValueError(f"expected a span start:stop with stop > start, found {self.span}")
        if "." in self.dht_prefix or " " in self.dht_prefix or not self.dht_prefix:
            raise ValueError(f"expected a DHT prefix without dots and spaces, found {self.dht_prefix!r}")
        return self

    @property
    def span(self) -> Span:
        """The blocks it holds."""
        return Span(self.start, self.stop)

    @property
    def initial_faults(self) -> tuple[AnyFault, ...]:
        """The faults it starts with."""
        return (*self.faults, *([TrainingMode(dropout=self.dropout)] if self.dropout else []))

    @property
    def session_tokens(self) -> int:
        """Tokens that one session may reserve."""
        return self.inference_max_length or self.max_batch_size

    @property
    def cache_tokens(self) -> int:
        """Tokens that all sessions together may reserve."""
        return self.attn_cache_tokens or 2 * self.session_tokens

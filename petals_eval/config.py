"""Every setting of a swarm connection and of a run, with its default and its unit, in one place."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from petals_eval.errors import ConfigError
from petals_eval.validation import SETTINGS, explain

__all__ = ["PUBLIC_SWARM", "RunSettings", "Settings", "SwarmSettings"]

# The bootstrap peers of the public Petals swarm (2023-2025), as the petals package lists them.
PUBLIC_SWARM: tuple[str, ...] = (
    "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/dns6/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns6/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/ip4/159.203.156.48/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
)


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, mistakes raised as ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), SETTINGS)) from error


_ADDRESS = "expected a multiaddress such as /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW..."


def _multiaddress(value: object) -> object:
    """A multiaddress with a peer identity, checked by hivemind's own parser."""
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
    from hivemind.utils.multiaddr import Multiaddr

    if not isinstance(value, str):
        raise ValueError(_ADDRESS)
    try:
        PeerID.from_base58(Multiaddr(value)["p2p"])
    except (ValueError, LookupError) as error:
        raise ValueError(_ADDRESS) from error
    return value


Multiaddress = Annotated[str, BeforeValidator(_multiaddress)]
Seconds = Annotated[float, Field(gt=0)]


def _as_list(value: object) -> object:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


def _split(value: object) -> object:
    """Addresses in one text, apart by blanks, as people keep them in a variable of the shell."""
    texts = _as_list(value)
    if not isinstance(texts, list | tuple):
        return value
    return [part for text in texts for part in (text.split() if isinstance(text, str) else [text])]


def _at_least_one(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses:
        raise ValueError(_ADDRESS)
    return addresses


def _identity(name: str) -> str:
    """Every identity ends in nothing: an empty variable of the shell would allow, or deny, all servers."""
    if not name.strip(". "):
        raise ValueError("expected a server's identity or its last letters")
    return name


def _blocks(value: object) -> object:
    """Blocks first:last as people write them, "0:3"."""
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
            value = (int(parts[0]), int(parts[1]))
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(part, int) for part in value):
        raise ValueError("expected blocks FIRST:LAST such as 0:3, the last one not among them")
    if not 0 <= value[0] < value[1]:
        raise ValueError("expected blocks FIRST:LAST with 0 <= FIRST < LAST")
    return tuple(value)


Peers = Annotated[tuple[Multiaddress, ...], BeforeValidator(_split)]
SomePeers = Annotated[Peers, AfterValidator(_at_least_one)]
Blocks = Annotated[tuple[int, int], BeforeValidator(_blocks)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Identities = Annotated[tuple[Annotated[str, AfterValidator(_identity)], ...], BeforeValidator(_as_list)]
Dtype = Literal["float32", "bfloat16", "float16"]
Wire = Literal["float16", "blockwise8", "uniform8"]
Push = Literal["auto", "always", "never"]
Pool = Literal["auto", "last", "last-not-pad", "before-first-pad", "count-not-pad"]


class SwarmSettings(Settings):
    """How to reach a swarm and how long to wait for it."""

    initial_peers: SomePeers  # bootstrap peers; one that answers is enough

    # whom to use; servers that do not say what is asked for are left out, too
    active_adapter: str | None = None  # LoRA adapter on the servers; only servers that announce it are used
    require_dtype: Dtype | None = None  # what servers must compute in
    require_quant: str | None = None  # how servers must quantise: "none", "int8" or "nf4"
    allow_servers: Identities = ()  # identities, whole or their last letters; empty: everybody
    deny_servers: Identities = ()  # the same, left out
    allow_nondeterministic: bool = False  # where nobody else holds the blocks, use servers that run in training mode

    startup_timeout: Seconds = 30.0  # seconds until the libp2p daemon and the DHT node must be up
    connect_timeout: Seconds = 10.0  # seconds for a server's first answer (rpc_info), or for a session to be opened
    request_timeout: Seconds = 180.0  # seconds for one call of one hop; Petals servers stop working on it then, too
    deadline: Seconds = 600.0  # seconds a micro-batch may take for one hop: waiting for a server, calls and retries

    update_period: Seconds = 60.0  # seconds between two looks at the DHT
    missing_update_period: Seconds = 2.0  # the same, while blocks are missing
    min_backoff: Seconds = 1.0  # seconds a failed server is left alone; doubles with each failure in a row
    max_backoff: Seconds = 60.0  # seconds it is left alone at most

    max_tokens_per_call: int | None = Field(default=None, gt=0)  # tokens (rows x positions); None: the server's default
    window: int | None = Field(default=None, gt=0)  # micro-batches in flight at once; None: found out, per server
    wire: Wire | None = None  # lossy code of hidden states, to save bytes; None: lossless
    push: Push = "auto"  # let servers pass hidden states on to each other, to save the uplink; "auto": where it pays
    recheck_share: float = Field(default=0.003, ge=0, le=1)  # of a server's tokens, to ask it again during the run
    verify: float = Field(
        default=0.02, ge=0, le=1
    )  # of a server's micro-batches, to have computed elsewhere too; 0: none, nor on a lossy wire


class RunSettings(Settings):
    """One run, as the command line and its YAML file give it: every flag of `petals-eval run` is a field here."""

    # what is evaluated
    model: str  # hub name or local folder
    revision: str | None = None  # of the model on the hub
    token: SecretStr | None = None  # for gated repositories; the hub's own HF_TOKEN works too
    adapter: Names = ()  # prompt-tuned checkpoints: files, folders or hub names
    active_adapter: str | None = None  # LoRA adapter on the servers
    without_prompts: bool = False  # evaluate the first adapter's head without its prompts, too
    dtype: Dtype | None = None  # at home; None: the checkpoint's
    device: str = "cpu"  # at home
    pool: Pool = "auto"  # which token a head reads in a text with padding tokens; "auto": as whoever trained it

    # on what
    task: str  # a shipped task or a YAML file
    data: str | None = None  # file or hub name; None: the task's own
    subset: str | None = None  # of a hub data set
    split: str | None = None  # of a hub data set
    data_revision: str | None = None  # of a hub data set
    limit: int | None = Field(default=None, gt=0)  # examples, drawn by the seed; None: all
    seed: int = 0  # of the sample and of the bootstrap intervals
    max_length: int | None = Field(default=None, gt=0)  # tokens of text; None: the task's
    shard: str | None = None  # "2/3": the second of three parts of the examples; None: all of them

    # where
    initial_peers: Peers = ()  # bootstrap peers
    public_swarm: bool = False  # the public Petals swarm
    local_swarm: int | None = Field(default=None, gt=0)  # servers of an embedded swarm on this machine
    dht_prefix: str | None = None  # the name servers announce; None: Petals' rule for the hub name
    require_dtype: Dtype | None = None  # what servers must compute in
    require_quant: str | None = None  # how servers must quantise: "none", "int8" or "nf4"
    allow_server: Identities = ()  # use only these servers: identities, whole or their last letters
    deny_server: Identities = ()  # leave these out
    allow_nondeterministic: bool = False  # where nobody else holds the blocks, use servers that run in training mode
    verify: float = Field(default=SwarmSettings.model_fields["verify"].default, ge=0, le=1)  # share computed twice
    verify_local: Blocks | None = None  # blocks first:last to keep at home, and hold their servers against
    deadline: Seconds = SwarmSettings.model_fields["deadline"].default  # seconds to wait for a server, per hop
    request_timeout: Seconds = SwarmSettings.model_fields["request_timeout"].default  # seconds for one call
    window: int | None = Field(default=None, gt=0)  # micro-batches in flight; None: found out, per server
    max_tokens_per_call: int | None = Field(default=None, gt=0)  # tokens a server takes; None: found out
    tokens_per_micro_batch: int | None = Field(default=None, gt=0)  # positions sent together; None: found out
    wire: Wire | None = None  # lossy code of hidden states, to save bytes; None: lossless
    push: Push = "auto"  # let servers pass hidden states on to each other; "auto": where it pays

    # what comes of it
    out: str | None = None  # run folder; None: runs/<task>-<time>
    max_failed: int = Field(default=0, ge=0)  # examples that may fail before the exit code is 1
    fail_under: Names = ()  # METRIC=NUMBER; below it the exit code is 1
    dry_run: bool = False  # show what would be sent, and send nothing
    json_output: bool = Field(default=False, alias="json")  # print metrics.json alone on stdout

    @model_validator(mode="after")
    def _one_swarm(self) -> "RunSettings":
        chosen = {
            "--initial-peers": bool(self.initial_peers),
            "--public-swarm": self.public_swarm,
            "--local-swarm": self.local_swarm is not None,
        }
        named = [flag for flag, given in chosen.items() if given]
        if len(named) != 1:
            found = " and ".join(named) if named else "none"
            raise ValueError(
                "expected exactly one swarm: --initial-peers MADDR, --public-swarm, or --local-swarm N for one that is "
                f"embedded; found {found}"
            )
        return self

    @model_validator(mode="after")
    def _something_to_print(self) -> "RunSettings":
        if self.dry_run and self.json_output:
            raise ValueError("--dry-run computes no metrics, so there is nothing for --json to print: leave one out")
        return self

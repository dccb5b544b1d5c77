"""Every setting of a swarm connection and of a run, with its default, its unit and its flag, in one place."""

from typing import Annotated, Any, Literal, Self

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

__all__ = [
    "PUBLIC_SWARM",
    "CallSettings",
    "ModelOnSwarm",
    "ResultSettings",
    "RunSettings",
    "ServerChoice",
    "Settings",
    "SwarmSettings",
]

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
    """Check a multiaddress with a peer identity by hivemind's own parser."""
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
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _as_list(value: object) -> object:
    """Take one name for a list of one."""
    return [value] if isinstance(value, str) else value


def _split(value: object) -> object:
    """Split a text of several addresses at its blanks, as people keep them in a variable of the shell."""
    texts = _as_list(value)
    if not isinstance(texts, list | tuple):
        return value
    return [part for text in texts for part in (text.split() if isinstance(text, str) else [text])]


def _at_least_one(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses:
        raise ValueError(_ADDRESS)
    return addresses


def _identity(name: str) -> str:
    """Refuse a blank: every identity ends in it, so that an empty variable of the shell would allow, or deny, all."""
    if not name.strip(". "):
        raise ValueError("expected a server's identity or its last letters")
    return name


def _blocks(value: object) -> object:
    """Read blocks as people write them, such as "0:3" for the first three."""
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


HEADINGS = ("Model", "Task and data", "Swarm", "Servers and calls", "Probes", "Budget", "Sweep", "Output")
"""The headings of flags in a command's help, in their order."""
MODEL, TASK, SWARM, SERVERS, PROBES, BUDGET, SWEEP, OUTPUT = HEADINGS


def option(
    default: Any,
    help: str,
    group: str = "",
    metavar: str | None = None,
    *,
    unset: str | None = None,
    flag: str | None = None,
    alias: str | None = None,
) -> Any:
    """Return a field of settings that says of itself what `petals_eval.cli.flags` shows.

    help: what it means and its unit, in a sentence. group, metavar: in the help of a command. unset: what None stands
    for. flag: where it is not called as the field. alias: the key of a file, where it is not.
    """
    shown = {"group": group, "metavar": metavar, "unset": unset, "flag": flag}
    return Field(default, description=help, json_schema_extra=shown, alias=alias)  # type: ignore[arg-type]


def same_as(settings: type[BaseModel], name: str, *, default: Any = ..., group: str | None = None) -> Any:
    """Return a field that says what a field of other settings does, with a default or a heading of its own if given."""
    field = settings.model_fields[name]
    shown: dict[str, Any] = dict(field.json_schema_extra) if isinstance(field.json_schema_extra, dict) else {}
    return option(
        field.default if default is ... else default,
        field.description or "",
        **shown | ({} if group is None else {"group": group}),
    )


class ServerChoice(Settings):
    """Which servers are used; those that do not say what is asked for are left out, too."""

    active_adapter: str | None = option(
        None, "LoRA adapter on the servers; only servers that announce it are used.", SERVERS, "NAME"
    )
    require_dtype: Dtype | None = option(None, "Use only servers that compute in this dtype.", SERVERS, "DTYPE")
    require_quant: str | None = option(
        None,
        "Use only servers of this quantisation (none, int8 or nf4); none leaves quantised ones out.",
        SERVERS,
        "QUANT",
    )
    allow_servers: Identities = option(
        (), "Use only these servers (identities or their last letters).", SERVERS, "ID...", flag="--allow-server"
    )
    deny_servers: Identities = option((), "Leave these servers out.", SERVERS, "ID...", flag="--deny-server")


class CallSettings(ServerChoice):
    """How servers are used, and how long is waited for them."""

    allow_nondeterministic: bool = option(
        False,
        "Use servers whose blocks run in training mode where nobody else holds them; the report says how far their "
        "answers differ.",
        SERVERS,
    )
    verify: Share = option(
        0.02,
        "Share of each server's micro-batches that is computed on another server too and compared, not on a lossy "
        "wire. 0: none.",
        SERVERS,
        "SHARE",
    )
    deadline: Seconds = option(
        600.0,
        "Wait this long for a server that can take the work, for one hop of a micro-batch with its retries.",
        SERVERS,
        "SECONDS",
    )
    request_timeout: Seconds = option(
        180.0, "Time for one call of one hop; Petals servers stop working on it then, too.", SERVERS, "SECONDS"
    )
    window: Positive | None = option(
        None, "Micro-batches in flight at once.", SERVERS, "N", unset="found out, for each server"
    )
    max_tokens_per_call: Positive | None = option(
        None, "Tokens (rows x positions) that a server takes in one call.", SERVERS, "N", unset="found out"
    )
    wire: Wire | None = option(
        None,
        "Send hidden states in a lossy code: float16, blockwise8 or uniform8; the report says how far that moves "
        "answers.",
        SERVERS,
        "CODE",
        unset="lossless",
    )
    push: Push = option(
        "auto",
        "Let servers pass hidden states on to each other, so that each leaves here once: auto (where that is faster), "
        "always or never.",
        SERVERS,
        "WHEN",
    )


class SwarmSettings(CallSettings):
    """How to reach a swarm and how long to wait for it."""

    initial_peers: SomePeers = option(..., "Multiaddresses of bootstrap peers; one that answers is enough.")

    startup_timeout: Seconds = option(
        30.0, "Time until the libp2p daemon and the DHT node must be up.", metavar="SECONDS"
    )
    connect_timeout: Seconds = option(
        10.0,
        "Time for a server's first answer (rpc_info), connecting included, or for a session to be opened.",
        metavar="SECONDS",
    )
    update_period: Seconds = option(60.0, "Seconds between two looks at the DHT.")
    missing_update_period: Seconds = option(2.0, "Seconds between two looks at the DHT while blocks are missing.")
    min_backoff: Seconds = option(
        1.0, "Seconds that a failed server is left alone; they double with each failure in a row."
    )
    max_backoff: Seconds = option(60.0, "Seconds that a failed server is left alone at most.")
    recheck_share: Share = option(0.003, "Share of a server's tokens that is spent on asking it again during the run.")

    @classmethod
    def of(cls, settings: Settings, **changes: Any) -> Self:
        """Return what these settings, of a command, say of a connection: the fields that both have, and `changes`."""
        shared = cls.model_fields.keys() & type(settings).model_fields.keys()
        return cls(**{name: getattr(settings, name) for name in shared} | changes)


class ModelOnSwarm(Settings):
    """A model, and exactly one swarm that has its blocks."""

    model: str = option(..., "Hub name or local folder.", MODEL, "NAME")
    revision: str | None = option(None, "Revision of the model on the hub.", MODEL, "REV")
    token: SecretStr | None = option(None, "Hub token for gated repositories (or set HF_TOKEN).", MODEL, "TOKEN")
    initial_peers: Peers = option(
        (), "Multiaddresses of bootstrap peers; one that answers is enough.", SWARM, "MADDR..."
    )
    public_swarm: bool = option(False, "The public Petals swarm: strangers' machines.", SWARM)
    local_swarm: Positive | None = option(None, "N servers embedded on this machine.", SWARM, "N")
    dht_prefix: str | None = option(
        None, "Name the servers announce.", SWARM, "NAME", unset="by Petals' rule for the hub name"
    )

    @property
    def hub_token(self) -> str | None:
        """The token as the hub's client takes it."""
        return None if self.token is None else self.token.get_secret_value()

    @model_validator(mode="after")
    def _one_swarm(self) -> Self:
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


class ResultSettings(Settings):
    """What a result must reach, and how it is printed."""

    max_failed: Annotated[int, Field(ge=0)] = option(0, "Exit code 1 if more examples than this fail.", OUTPUT, "N")
    fail_under: Names = option((), "Exit code 1 if a metric is below this; repeatable.", OUTPUT, "METRIC=X...")
    json_output: bool = option(False, "Print metrics.json alone on stdout.", OUTPUT, flag="--json", alias="json")


class RunSettings(ModelOnSwarm, CallSettings, ResultSettings):
    """One run, as the command line and its YAML file give it: every flag of `petals-eval run` is a field here."""

    adapter: Names = option(
        (), "Prompt-tuned checkpoints: file, folder or hub name; shown side by side.", MODEL, "NAME..."
    )
    without_prompts: bool = option(False, "Also evaluate the first adapter's head without its prompts.", MODEL)
    dtype: Dtype | None = option(None, "Dtype of the computation at home.", MODEL, "DTYPE", unset="the checkpoint's")
    device: str = option("cpu", "Device of the computation at home.", MODEL, "DEVICE")
    pool: Pool = option(
        "auto",
        "Which token a trained head reads in a text that holds the padding token: last, last-not-pad, before-first-pad "
        "or count-not-pad; auto: as the library that trained the head.",
        MODEL,
        "RULE",
    )

    task: str = option(..., "Shipped task (see petals-eval tasks) or YAML file.", TASK, "TASK")
    data: str | None = option(
        None, "csv, tsv, jsonl, parquet or text file, or hub name.", TASK, "DATA", unset="the task's"
    )
    subset: str | None = option(None, "Subset of a hub data set.", TASK, "NAME")
    split: str | None = option(None, "Split of a hub data set.", TASK, "NAME")
    data_revision: str | None = option(None, "Revision of a hub data set.", TASK, "REV")
    limit: Positive | None = option(None, "Evaluate this many examples, drawn by --seed.", TASK, "N", unset="all")
    seed: int = option(0, "Seed of the sample and of the intervals.", TASK, "S")
    max_length: Positive | None = option(None, "Tokens of text at most.", TASK, "N", unset="the task's")
    shard: str | None = option(
        None, "Evaluate part I of N, from 1/N to N/N; petals-eval merge joins them.", TASK, "I/N"
    )

    verify_local: Blocks | None = option(
        None, "Load these blocks here, and hold their servers against them.", SERVERS, "FIRST:LAST"
    )
    tokens_per_micro_batch: Positive | None = option(
        None, "Positions sent together, prompts included.", SERVERS, "N", unset="found out"
    )

    out: str | None = option(
        None, "Run folder; an unfinished run goes on.", OUTPUT, "FOLDER", unset="runs/<task>-<time>"
    )
    dry_run: bool = option(False, "Show what would be sent; send nothing.", OUTPUT)

    @model_validator(mode="after")
    def _something_to_print(self) -> Self:
        if self.dry_run and self.json_output:
            raise ValueError("--dry-run computes no metrics, so there is nothing for --json to print: leave one out")
        return self

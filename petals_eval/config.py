"""Every setting of a swarm connection and of a run, with its default, its unit and its flag, in one place."""

import re
from collections.abc import Mapping, Sequence
from inspect import get_annotations
from ipaddress import ip_address
from os import PathLike, fspath
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
from pydantic.fields import FieldInfo

from petals_eval.environment import local_path
from petals_eval.errors import ConfigError
from petals_eval.validation import SETTINGS, explain

__all__ = [
    "PUBLIC_SWARM",
    "STRANGERS",
    "CallSettings",
    "ErrorSettings",
    "ModelOnSwarm",
    "PromptSettings",
    "ResultSettings",
    "RunSettings",
    "ServerChoice",
    "Settings",
    "SwarmSettings",
    "TextSettings",
    "checked_peers",
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

STRANGERS = "note: on the public swarm, strangers' machines see the activations of these examples."
"""What whoever uses it is told first."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, mistakes raised as ConfigError.

    heading: of a subclass's own flags in the help of commands; without one its fields have no flags.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init_subclass__(cls, heading: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)  # `heading` is for the next one, when there are fields

    @classmethod
    def __pydantic_init_subclass__(cls, heading: str = "", **options: Any) -> None:
        for name in get_annotations(cls).keys() & cls.model_fields.keys():
            shown_of(cls.model_fields[name]).setdefault("heading", heading)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), SETTINGS)) from error


_MAX_NAME_CHARACTERS = 100  # files of a run folder have the names of adapters
_PLACE = "expected a path, a hub name, or NAME=PATH"
_ADDRESS = "expected a multiaddress such as /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW... or drift://12D3KooW...@203.0.113.5:31337"
_DRIFT_ADDRESS = re.compile(r"drift://(?P<peer>[^@]+)@(?P<host>\[[^]]+\]|[^:]+):(?P<port>\d+)", re.IGNORECASE)


def _from_drift(address: str) -> str:
    """Return the multiaddress that an address `drift://ID@HOST:PORT` stands for; any other text as it is.

    DRIFT prints such addresses for whoever joins a swarm (`drift.utils.join_token`); one of IPv6 stands in brackets.
    """
    match = _DRIFT_ADDRESS.fullmatch(address)
    if match is None:
        return address
    host = match["host"].strip("[]")
    try:
        protocol = f"ip{ip_address(host).version}"
    except ValueError:
        protocol = "dns"
    return f"/{protocol}/{host}/tcp/{match['port']}/p2p/{match['peer']}"


def _multiaddress(value: object) -> object:
    """Check a multiaddress with a peer identity by hivemind's own parser."""
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
    from hivemind.utils.multiaddr import Multiaddr

    if not isinstance(value, str):
        raise ValueError(_ADDRESS)
    value = _from_drift(value)
    try:
        PeerID.from_base58(Multiaddr(value)["p2p"])
    except (ValueError, LookupError) as error:
        # An address is longer than what a message shows of a value, and what is wrong is mostly at its end.
        end = f"; it ends in {value[-20:]!r}" if len(value) > 60 else ""
        if value.startswith("/") and "/p2p/" not in value:
            end = "; it has no /p2p/ with the identity of the peer behind it"
        raise ValueError(f"{_ADDRESS}{end}") from error
    return value


Multiaddress = Annotated[str, BeforeValidator(_multiaddress)]
Seconds = Annotated[float, Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _as_list(value: object) -> object:
    """Take one name for a list of one."""
    return [value] if isinstance(value, str | PathLike) else value


def _as_text(value: object) -> object:
    """Take a path for its text."""
    return fspath(value) if isinstance(value, PathLike) else value


def _not_blank(place: str) -> str:
    """Refuse a text without a letter: an empty variable of the shell would be the folder that one is in."""
    if not place.strip():
        raise ValueError("expected a path or a name: is a variable of the shell empty?")
    return place


def _as_adapters(value: object) -> object:
    """Take a mapping of names to places for pairs, and one place for a list of one."""
    return list(value.items()) if isinstance(value, Mapping) else _as_list(value)


def _adapter(value: object) -> object:
    """Read NAME=PATH as a pair. A path that is there is a path, even if it holds an equals sign."""
    if isinstance(value, tuple | list) and len(value) == 2:
        name, place = value[0], _as_text(value[1])
    else:
        place = _as_text(value)
        if not isinstance(place, str):
            raise ValueError(_PLACE)
        name, sign, rest = place.partition("=")
        if not sign or not rest or "/" in name or local_path(place).exists():
            return _not_blank(place)
        place = rest
    if not isinstance(place, str):
        raise ValueError(_PLACE)
    _not_blank(place)
    is_path = isinstance(name, str) and (name.startswith("~") or not {"/", "\\"}.isdisjoint(name))
    if not isinstance(name, str) or is_path or not 0 < len(name.strip()) <= _MAX_NAME_CHARACTERS:
        raise ValueError(f"expected a name of 1 to {_MAX_NAME_CHARACTERS} characters that is no path, in NAME=PATH")
    return name, place


def _split(value: object) -> object:
    """Split a text of several addresses at its blanks, as people keep them in a variable of the shell."""
    texts = _as_list(value)
    if not isinstance(texts, list | tuple):
        return value
    parts = [part for text in texts for part in (text.split() if isinstance(text, str) else [text])]
    if texts and not parts:
        raise ValueError(f"{_ADDRESS}: is a variable of the shell empty?")
    return parts


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
Place = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank)]  # a path, or a name on the hub
OwnPlace = Annotated[Place, AfterValidator(lambda path: str(local_path(path)))]  # on this machine, in any case
AdapterPlace = Annotated[str | tuple[str, str], BeforeValidator(_adapter)]  # a pair (name, place) where it has a name
AdapterPlaces = Annotated[tuple[AdapterPlace, ...], BeforeValidator(_as_adapters)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Identities = Annotated[tuple[Annotated[str, AfterValidator(_identity)], ...], BeforeValidator(_as_list)]
Dtype = Literal["float32", "bfloat16", "float16"]
Wire = Literal["float16", "blockwise8", "uniform8"]
Push = Literal["auto", "always", "never"]
Lanes = Literal["never", "auto", "always"]
Pool = Literal["auto", "last", "last-not-pad", "before-first-pad", "count-not-pad"]


HEADINGS = ("Model", "Task and data", "Swarm", "Servers and calls", "Probes", "Budget", "Sweep", "Output")
"""The headings of flags in a command's help, in their order."""
MODEL, TASK, SWARM, SERVERS, PROBES, BUDGET, SWEEP, OUTPUT = HEADINGS


def option(default: Any, help: str, metavar: str | None = None, *, alias: str | None = None, **shown: str) -> Any:
    """Return a field of settings that says of itself what `petals_eval.cli.flags` shows.

    help: what it means and its unit, in a sentence. metavar: its value in the help; N or SECONDS for a number.
    alias: the key of a file, where that is not the field's name. shown: unset (what None stands for), flag and heading,
    where those do not follow from the field's name and its class.
    """
    return Field(default, description=help, json_schema_extra={"metavar": metavar, **shown}, alias=alias)


def same_as(settings: type[BaseModel], name: str, *, default: Any = ..., **shown: str) -> Any:
    """Return a field that is described as one of other settings is, but for its default and what is `shown`."""
    field = settings.model_fields[name]
    return option(field.default if default is ... else default, field.description or "", **shown_of(field) | shown)


def shown_of(field: FieldInfo) -> dict[str, Any]:
    """Return what `option` was told of a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class ServerChoice(Settings, heading=SERVERS):
    """Which servers are used; those that do not say what is asked for are left out, too."""

    active_adapter: str | None = option(
        None, "LoRA adapter on the servers; only servers that announce it are used.", "NAME"
    )
    require_dtype: Dtype | None = option(None, "Use only servers that compute in this dtype.", "DTYPE")
    require_quant: str | None = option(
        None, "Use only servers of this quantisation (none, int8, nf4); none leaves quantised ones out.", "QUANT"
    )
    allow_servers: Identities = option(
        (), "Use only these servers (identities or their last letters).", "ID...", flag="--allow-server"
    )
    deny_servers: Identities = option((), "Leave these servers out.", "ID...", flag="--deny-server")


class CallSettings(ServerChoice, heading=SERVERS):
    """How servers are used, and how long is waited for them."""

    allow_nondeterministic: bool = option(
        False, "Use servers in training mode where nobody else holds their blocks; the report has the noise."
    )
    verify: Share = option(
        0.02,
        "Share of each server's micro-batches computed elsewhere, too, and compared; none on a lossy wire.",
        "SHARE",
    )
    deadline: Seconds = option(600.0, "Wait this long for a server, for one hop of a micro-batch with its retries.")
    request_timeout: Seconds = option(180.0, "Time for one call of one hop; Petals servers give up then, too.")
    window: Positive | None = option(None, "Micro-batches in flight at once.", unset="measured, for each server")
    max_tokens_per_call: Positive | None = option(
        None, "Tokens (rows x positions) that a server takes in one call.", unset="measured"
    )
    generation_rows: Positive = option(8, "Texts that are generated at once, each in a session of its own.")
    wire: Wire | None = option(
        None,
        "Send hidden states in a lossy code: float16, blockwise8 or uniform8; the report says what it does to answers.",
        "CODE",
        unset="lossless",
    )
    push: Push = option(
        "auto",
        "Let servers pass hidden states on, so that each leaves here once: auto (where that is faster), always, never.",
        "WHEN",
    )
    lanes: Lanes = option(
        "never",
        "Keep what rows have in common in the servers' caches, and send the rest alone: never, auto, always.",
        "WHEN",
    )
    cache_share: Share = option(
        0.25, "Share of a server's cache for sessions that lanes may take, of what was free before them.", "SHARE"
    )


class SwarmSettings(CallSettings):
    """How to reach a swarm and how long to wait for it."""

    initial_peers: SomePeers = option(..., "Multiaddresses of bootstrap peers; one that answers is enough.", "MADDR...")

    startup_timeout: Seconds = option(30.0, "Time until the libp2p daemon and the DHT node must be up.")
    connect_timeout: Seconds = option(10.0, "Time to connect to a server and have its rpc_info, or to open a session.")
    index_keys: Names = option(
        (),
        "DHT keys under which servers keep their index of models, beside those of Petals, BloomBee and DRIFT.",
        "KEY...",
        flag="--index-key",
    )
    update_period: Seconds = option(60.0, "Time between two looks at the DHT.")
    missing_update_period: Seconds = option(2.0, "Time between two looks at the DHT while blocks are missing.")
    min_backoff: Seconds = option(1.0, "How long a failed server is left alone, doubled with each failure in a row.")
    max_backoff: Seconds = option(60.0, "How long a failed server is left alone at most.")
    recheck_share: Share = option(0.003, "Share of a server's tokens that is spent on asking it again during the run.")

    @classmethod
    def of(cls, settings: Settings, **changes: Any) -> Self:
        """Return what these settings, of a command, say of a connection: the fields that both have, and `changes`."""
        shared = cls.model_fields.keys() & type(settings).model_fields.keys()
        return cls(**{name: getattr(settings, name) for name in shared} | changes)


def checked_peers(texts: str | Sequence[str]) -> tuple[str, ...]:
    """Return the addresses of peers, also several in one text, apart by blanks. Raises ConfigError."""
    given: dict[str, Any] = {"initial_peers": texts}
    return SwarmSettings(**given).initial_peers if texts else ()


class ModelSettings(Settings, heading=MODEL):
    """Which model."""

    model: Place = option(..., "Hub name or local folder.", "NAME")
    revision: str | None = option(None, "Revision of the model on the hub.", "REV")
    token: SecretStr | None = option(None, "Hub token for gated repositories (or set HF_TOKEN).", "TOKEN")

    @property
    def hub_token(self) -> str | None:
        """The token as the hub's client takes it."""
        return None if self.token is None else self.token.get_secret_value()


class ModelOnSwarm(ModelSettings, heading=SWARM):
    """A model, and exactly one swarm that has its blocks."""

    initial_peers: Peers = same_as(SwarmSettings, "initial_peers", default=(), heading=SWARM)
    public_swarm: bool = option(False, "The public Petals swarm: strangers' machines.")
    local_swarm: Positive | None = option(None, "N servers embedded on this machine.")
    dht_prefix: str | None = option(
        None, "Name the servers announce.", "NAME", unset="by Petals' rule for the hub name"
    )
    index_keys: Names = same_as(SwarmSettings, "index_keys", heading=SWARM)

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


class TaskSettings(Settings, heading=TASK):
    """What is evaluated."""

    task: Place = option(..., "Shipped task (see petals-eval tasks) or YAML file.", "TASK")
    data: Place | None = option(None, "csv, tsv, jsonl, parquet or text file, or hub name.", "DATA", unset="the task's")
    subset: str | None = option(None, "Subset of a hub data set.", "NAME")
    split: str | None = option(None, "Split of a hub data set.", "NAME")
    data_revision: str | None = option(None, "Revision of a hub data set.", "REV")
    limit: Positive | None = option(None, "Evaluate this many examples, drawn by --seed.", unset="all")
    seed: int = option(0, "Seed of the sample, and of the intervals of differences.", "S")
    max_length: Positive | None = option(None, "Tokens of text at most.", unset="the task's")
    unlabelled: Literal["error", "predict"] | None = option(
        None,
        "Rows without a label: error, or predict, which leaves them out of the metrics.",
        "WHAT",
        unset="the task's",
    )
    shard: str | None = option(None, "Evaluate part I of N, from 1/N to N/N; petals-eval merge joins them.", "I/N")


class PromptSettings(Settings, heading=TASK):
    """What stands around a row's question, where a run asks for something else than its task does."""

    shots: Annotated[int, Field(ge=0)] | None = option(
        None, "Rows that stand before each question with their answers.", unset="the task's"
    )
    shots_data: Place | None = option(
        None, "File or hub name to draw shots from.", "DATA", unset="the evaluated data set"
    )
    shots_split: str | None = option(None, "Split to draw shots from.", "NAME", unset="the task's, or train")
    shots_seed: int | None = option(None, "Seed of the draw of shots.", "S", unset="the task's, or 1234")
    draws: Positive = option(1, "Evaluate so many draws of shots, by as many seeds; the result is their mean.")
    chat: bool = option(False, "Write texts in the tokenizer's chat template, shots as turns.")
    system: str | None = option(None, "System message of a chat; otherwise in front of the text.", "TEXT")
    bos: Literal["auto", "always", "never"] | None = option(
        None, "Beginning-of-text token in front: as the tokenizer does it (auto), always, never.", "WHEN"
    )
    allow_task_code: bool = option(False, "Let a task file of yours run its own Python function on rows.")


class ResultSettings(Settings, heading=OUTPUT):
    """What a result must reach, and how it is printed."""

    max_failed: Annotated[int, Field(ge=0)] = option(0, "Exit code 1 if more examples than this fail.")
    fail_under: Names = option((), "Exit code 1 if a metric is below this; repeatable.", "METRIC=X...")
    fail_over: Names = option(
        (), "Exit code 1 if a metric that is better when lower is above this; repeatable.", "METRIC=X..."
    )
    json_output: bool = option(False, "Print metrics.json alone on stdout.", flag="--json", alias="json")


class RunSettings(ModelOnSwarm, PromptSettings, TaskSettings, CallSettings, ResultSettings):
    """One run, as the command line and its YAML file give it: every flag of `petals-eval run` is a field here."""

    adapter: AdapterPlaces = option(
        (),
        "Prompt-tuned checkpoints: file, folder or hub name; shown side by side, each under NAME if that is given.",
        "[NAME=]PATH...",
        heading=MODEL,
    )
    adapter_task: Annotated[int, Field(ge=0)] | None = option(
        None, "Which task's prompts to take of an adapter that has prompts for several, counted from 0.", heading=MODEL
    )
    without_prompts: bool = option(False, "Also evaluate the first adapter's head without its prompts.", heading=MODEL)
    dtype: Dtype | None = option(
        None, "Dtype of the computation at home.", "DTYPE", unset="the checkpoint's", heading=MODEL
    )
    device: str = option("cpu", "Device of the computation at home.", "DEVICE", heading=MODEL)
    pool: Pool = option(
        "auto",
        "Which token a trained head reads in a text that holds the padding token: last, last-not-pad, before-first-pad "
        "or count-not-pad; auto: as the library that trained the head.",
        "RULE",
        heading=MODEL,
    )
    verify_local: Blocks | None = option(
        None, "Load these blocks here, and check their servers against them.", "FIRST:LAST", heading=SERVERS
    )
    tokens_per_micro_batch: Positive | None = option(
        None, "Positions sent together, prompts included.", unset="measured", heading=SERVERS
    )
    out: OwnPlace | None = option(
        None,
        "Run folder; an unfinished run goes on, a finished one is shown.",
        "FOLDER",
        unset="runs/<task>-<time>",
        heading=OUTPUT,
    )
    save_texts: bool = option(False, "Keep generated texts, in texts.jsonl of the run folder.", heading=OUTPUT)
    log_to: Names = option(
        (),
        "Log the result to wandb, trackio, mlflow or tensorboard, too; PLACE is its project, experiment or folder.",
        "TRACKER[=PLACE]...",
        heading=OUTPUT,
    )
    no_noise: bool = option(
        False, "Do not compute rows again at the end to see which predictions rounding may change.", heading=OUTPUT
    )
    dry_run: bool = option(False, "Show what would be sent, with --json as JSON; send nothing.", heading=OUTPUT)


class TextSettings(Settings, heading=OUTPUT):
    """Where the texts of a run's rows are: no file of a run has them."""

    task: Place | None = option(
        None, "Task that says how the rows are read: a shipped one or its YAML file.", "TASK", unset="that of the run"
    )
    data: Place | None = option(
        None,
        "The data that the run read: a file or hub name.",
        "DATA",
        unset="the task's, where it is what the run read",
    )
    subset: str | None = same_as(TaskSettings, "subset", heading=OUTPUT)
    split: str | None = same_as(TaskSettings, "split", heading=OUTPUT)
    data_revision: str | None = same_as(TaskSettings, "data_revision", heading=OUTPUT)
    token: SecretStr | None = same_as(ModelSettings, "token", heading=OUTPUT)
    allow_task_code: bool = same_as(PromptSettings, "allow_task_code", heading=OUTPUT)

    @property
    def as_arguments(self) -> dict[str, Any]:
        """What `petals_eval.errors_of` and its like take."""
        return {
            "task": self.task,
            "data": self.data,
            "allow_task_code": self.allow_task_code,
            "subset": self.subset,
            "split": self.split,
            "revision": self.data_revision,
            "token": self.token,
        }


class ErrorSettings(TextSettings, heading=OUTPUT):
    """What an analysis of errors shows, and where the texts of the rows are."""

    adapter: str | None = option(None, "Adapter, or draw of its shots, that is shown.", "NAME", unset="the first")
    limit: Annotated[int, Field(ge=0)] = option(5, "Rows in each list, and labels that were confused.")
    json_output: bool = option(False, "Print the analysis as JSON alone on stdout.", flag="--json", alias="json")

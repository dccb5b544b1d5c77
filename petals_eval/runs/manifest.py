"""What a run was: enough to check it and to go on with it, and nothing that may not be shared."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from petals_eval.errors import ConfigError, RunFolderError
from petals_eval.metrics.text_libraries import LIBRARIES
from petals_eval.runs.disk import blame_the_machine, write_atomically
from petals_eval.runs.privacy import shareable_name, shareable_settings

__all__ = [
    "AdapterRecord",
    "DataRecord",
    "LosslessServer",
    "Manifest",
    "ModelRecord",
    "NoiseRecord",
    "NoisyServer",
    "RecomputeWay",
    "Recomputed",
    "ServerUsed",
    "Verdict",
    "WireRecord",
    "WireSample",
    "check_names",
    "difference",
    "package_versions",
]

SCHEMA_VERSION = 2
PACKAGES = (
    "petals_eval",
    "torch",
    "transformers",
    "tokenizers",
    "hivemind",
    "numpy",
    "datasets",
    "peft",
    "petals",
    "sacrebleu",
    "rouge-score",
)
# Another version of these can change an answer, so a run does not go on under it.
ANSWERING_PACKAGES = ("petals_eval", "torch", "transformers", "tokenizers")

_BARS = ("fail_under", "fail_over", "max_failed")

_Name = Annotated[str, AfterValidator(shareable_name)]
_Settings = Annotated[dict[str, JsonValue], AfterValidator(shareable_settings)]


Verdict = Literal["noisy", "liar", "disputed"]


@dataclass(frozen=True, slots=True)
class ServerUsed:
    """A server that computed something, as it described itself then.

    peer_id: base58. first, end: its blocks [first, end). version, dtype, quant: its words; None where it said nothing.
    """

    peer_id: str
    first: int
    end: int
    version: str | None = None
    dtype: str | None = None
    quant: str | None = None


@dataclass(frozen=True, slots=True)
class NoisyServer:
    """A server whose answers were unequal, to one question ("noisy": its blocks run in training mode) or to those of
    others ("liar": found to be wrong; "disputed": nobody could settle who is).

    first, end: its blocks [first, end). version: its own word.
    difference: of two answers, relative to what its blocks did to the question.
    is_used: whether it computed all the same; otherwise nothing it computed is counted.
    verdict: "noisy", "liar" or "disputed".
    """

    peer_id: str
    first: int
    end: int
    version: str | None
    difference: float
    is_used: bool
    verdict: Verdict = "noisy"


@dataclass(frozen=True, slots=True)
class LosslessServer:
    """A server that was spoken to lossless on a lossy wire, and why."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WireSample:
    """Examples computed on the lossy wire and lossless.

    adapter: its name. largest, mean: of the absolute differences of all answers (logits or log-likelihoods); None where
    the answers are texts, or `note` says why nothing was measured. changed: predictions that differ, or texts; None
    where the kind of task has neither.
    """

    adapter: str
    examples: int
    largest: float | None
    mean: float | None
    changed: int | None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class WireRecord:
    """A run on a lossy wire. name: of the code. taken_by: peer ids of servers that took it; lossless: the others."""

    name: str
    sample: WireSample | None = None
    taken_by: tuple[str, ...] = ()
    lossless: tuple[LosslessServer, ...] = ()


RecomputeWay = Literal["batching", "replica", "lossless"]
"""How rows were computed again: in another batching, on other servers, or without the lossy wire of the run."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """How far a number moved in rows that were computed again in one way.

    number: what moved: the margin of the prediction, that by which a metric of choices chooses, the log-likelihood of a
    document, a regression's prediction. rows: in which it was compared. mean, largest: of the absolute changes.
    changed: predictions that became others; None where the kind of task has none.
    """

    way: RecomputeWay
    number: str
    rows: int
    mean: float
    largest: float
    changed: int | None


@dataclass(frozen=True, slots=True)
class NoiseRecord:
    """What came of computing rows of an adapter again. notes: what could not be tried or measured, and why."""

    adapter: str
    recomputed: tuple[Recomputed, ...] = ()
    notes: tuple[str, ...] = ()


_READING = {"is_read": True}


class _Record(BaseModel):
    """What is written has the fields that are here. What is read may have more: a later release may have added some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _write_no_others(cls, values: Any, info: ValidationInfo) -> Any:
        if info.context is not _READING and isinstance(values, dict) and (unknown := values.keys() - cls.model_fields):
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
        return values


class ModelRecord(_Record):
    """sha256: over the tensors that stay at home. revision: the hub's commit, None for a local folder."""

    name: _Name
    revision: str | None = None
    sha256: str


class AdapterRecord(_Record):
    """What was evaluated under a name of the journal.

    sha256: over the tensors that were used, whatever file they came from.
    adapter, draw: with several draws of shots, the adapter's own name and which draw it was, from 1; otherwise None.
    """

    name: _Name
    kind: str
    sha256: str
    adapter: _Name | None = None
    draw: int | None = None


class DataRecord(_Record):
    """fingerprint: of the content, the same on every machine. limit, seed: of the sample; limit None is everything.

    rows: how many are to be evaluated; with a shard (index from 1, count) this run does a part of them.
    """

    name: _Name
    fingerprint: str
    limit: int | None = None
    seed: int = 0
    rows: int | None = None
    shard: tuple[int, int] | None = None


class Manifest(_Record):
    """One run.

    answer_settings: whatever else changes an answer (dtype, lossy compression, ...); a resume needs the same.
    run_settings: what changes only how the run goes (batch sizes, deadlines, ...).
    task: the task's own fingerprint; task_sha256: of it as the task gave it. seeds: by what they seed.
    created, finished: UTC, ISO 8601; finished is None while the run is under way.
    kind: of task; answer_columns: the names of the columns of a row's values in the journal.
    servers: filled at the end. noisy_servers: as they are found. wire: what a lossy wire did; None on a lossless one.
    noise: how far the numbers of rows moved that were computed again, by adapter; empty where none were.

    Names that are paths are cut to their last part, secrets are dropped (`petals_eval.runs.privacy`).
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    finished: str | None = None
    model: ModelRecord
    adapters: tuple[AdapterRecord, ...]
    data: DataRecord
    task: _Settings
    task_sha256: str | None = None
    kind: str = "classification"
    answer_columns: tuple[str, ...] = ("score",)
    answer_settings: _Settings = {}
    run_settings: _Settings = {}
    seeds: dict[str, int] = {}
    packages: dict[str, str]
    servers: tuple[ServerUsed, ...] = ()
    noisy_servers: tuple[NoisyServer, ...] = ()
    wire: WireRecord | None = None
    noise: tuple[NoiseRecord, ...] = ()

    @classmethod
    def new(
        cls,
        *,
        model: ModelRecord,
        adapters: Sequence[AdapterRecord],
        data: DataRecord,
        task: dict[str, JsonValue],
        kind: str = "classification",
        answer_columns: Sequence[str] = ("score",),
        answer_settings: dict[str, JsonValue] | None = None,
        run_settings: dict[str, JsonValue] | None = None,
        seeds: dict[str, int] | None = None,
    ) -> "Manifest":
        """Return the manifest of a run that begins now, with the versions installed here. Raises as `check_names`."""
        check_names([adapter.name for adapter in adapters])
        return cls(
            created=_now(),
            model=model,
            adapters=tuple(adapters),
            data=data,
            task=task,
            kind=kind,
            answer_columns=tuple(answer_columns),
            # What may not be shared is not in `task`, but it may make two tasks differ.
            task_sha256=hashlib.sha256(json.dumps(task, sort_keys=True, default=str).encode()).hexdigest(),
            answer_settings=answer_settings or {},
            run_settings=run_settings or {},
            seeds=seeds or {},
            packages=package_versions(),
        )

    def going_on_from(self, begun: "Manifest") -> "Manifest":
        """Return this run as the one that was begun before.

        What does not change an answer may be set anew, such as the intervals' seed, and holds for all its numbers.
        """
        kept = {"created": begun.created, "noisy_servers": begun.noisy_servers, "wire": begun.wire}
        return self.model_copy(update=kept)

    def finish(self, servers: Iterable[ServerUsed]) -> "Manifest":
        """Return the same run, done, with the servers that computed it."""
        return self.model_copy(update={"finished": _now(), "servers": tuple(servers)})

    def with_noisy(self, found: Iterable[NoisyServer], cleared: Collection[str] = ()) -> "Manifest":
        """Return the same run with these servers noted; of each the last word counts.

        cleared: peer ids that were disputed, and are no more.
        """
        before = [each for each in self.noisy_servers if each.verdict != "disputed" or each.peer_id not in cleared]
        noted = {(each.peer_id, each.first, each.end): each for each in (*before, *found)}
        return self.model_copy(update={"noisy_servers": tuple(noted.values())})

    @property
    def bars(self) -> dict[str, Any]:
        """What the run must reach, under the keys of `ResultSettings`; nothing where nobody noted it."""
        return {name: self.run_settings[name] for name in _BARS if name in self.run_settings}

    def write(self, path: Path) -> None:
        """Raises MachineError."""
        write_atomically(path, [self.model_dump_json(indent=2), "\n"])

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest of this schema or an older one; fields that are not known here are left out.

        Raises RunFolderError for a file that is no manifest, or one of a newer schema; MachineError.
        """
        with blame_the_machine(path):
            text = path.read_bytes()
        try:
            found = _SchemaVersion.model_validate_json(text).schema_version
            if found > SCHEMA_VERSION:
                raise RunFolderError(
                    f"Expected {path} with schema version {SCHEMA_VERSION} or older; found {found}. "
                    "A newer petals-eval wrote it: update this one, or choose another folder with --out."
                )
            return cls.model_validate_json(text, context=_READING)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise RunFolderError(
                f"Expected the manifest of a run in {path}; found: {where}: {problem['msg']}. "
                "Choose another folder with --out."
            ) from error


class _SchemaVersion(BaseModel):
    schema_version: int


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError where two adapters share a name: the journal and the report could not tell them apart."""
    shared = [shareable_name(name) for name in names]
    for name in shared:
        if shared.count(name) > 1:
            raise ConfigError(
                f"Expected adapters of different names; found {name!r} {shared.count(name)} times. "
                "Give one a name of its own: --adapter NAME=PATH."
            )


def package_versions() -> dict[str, str]:
    """Return the versions installed here, by package, without importing them; and Python's."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def difference(before: Manifest, now: Manifest) -> list[str]:
    """Return what differs in what changes answers, one line each for a person; empty where the run may go on."""
    names = [[each.name for each in manifest.adapters] for manifest in (before, now)]
    shared = set.intersection(*map(set, names))  # of any other, that it is another says it all
    old, new = _answering(before, shared), _answering(now, shared)
    if set(names[0]) != set(names[1]):
        old["adapter"], new["adapter"] = map(", ".join, names)
    return [
        f"{key}: was {_shown(old.get(key))}, now {_shown(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _answering(manifest: Manifest, adapters: Collection[str]) -> dict[str, JsonValue]:
    """adapters: the names of those whose records are wanted."""
    data = manifest.data.model_dump()
    if data["limit"] is None:
        del data["seed"]  # it draws the sample, and there is none
    flat: dict[str, JsonValue] = {}
    _flatten("model", manifest.model.model_dump(), flat)
    for adapter in (each for each in manifest.adapters if each.name in adapters):
        _flatten(f"adapter {adapter.name}", adapter.model_dump(exclude={"name"}), flat)
    _flatten("data", data, flat)
    _flatten("task", manifest.task, flat)
    flat["task.sha256"] = manifest.task_sha256
    _flatten("setting", manifest.answer_settings, flat)
    answering = (*ANSWERING_PACKAGES, *_counting_packages(manifest.answer_columns))
    _flatten("package", {name: manifest.packages.get(name) for name in answering}, flat)
    return flat


def _counting_packages(columns: Sequence[str]) -> set[str]:
    """Return the packages whose counts of generated texts are under these columns of the journal."""
    metrics = {column.partition("/")[0] for column in columns}
    return {library.replace("_", "-") for metric, library in LIBRARIES.items() if metric in metrics}


def _flatten(prefix: str, value: JsonValue, into: dict[str, JsonValue]) -> None:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            _flatten(f"{prefix}.{key}", each, into)
    else:
        into[prefix] = value


def _shown(value: JsonValue) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""A run before it begins: everything is read once, and every mistake that local files can show is told.

The command, the dry run, the estimate and `evaluate` all begin here, before anything is started, downloaded or
connected. What has to be downloaded comes after what lies here.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import BaseModel

from petals_eval.config import CallSettings, ModelOnSwarm, PromptSettings, RunSettings
from petals_eval.data import DataSource, Rows, is_local, load_rows, rows_of
from petals_eval.data.rows import IN_MEMORY
from petals_eval.errors import ConfigError, ModelError
from petals_eval.evaluation.shots import RowsAndShots, row_code_of, rows_and_shots, with_prompt
from petals_eval.metrics.scored_rows import CLUSTER
from petals_eval.remote_model import LocalSide, check_device, dtype_of
from petals_eval.runs.code_hash import answering_code, task_code
from petals_eval.runs.disk import check_room
from petals_eval.runs.folder import DEFAULT_PARENT, RunFolder, check_folder, holds_finished
from petals_eval.runs.manifest import AdapterRecord, DataRecord, Manifest, ModelRecord, check_names
from petals_eval.runs.privacy import shareable_name
from petals_eval.runs.results import WITHOUT_PROMPTS
from petals_eval.runs.shard import Shard
from petals_eval.runs.thresholds import Threshold, check_parts, parse_thresholds
from petals_eval.tasks import Task, check_head_labels, load_task, resolve_source
from petals_eval.tasks.clusters import check_clusters, cluster_column
from petals_eval.tasks.labels import Unlabelled
from petals_eval.tasks.prompted import Prompting
from petals_eval.tasks.requests import Example
from petals_eval.tasks.tokens import tokenizer_sha256
from petals_eval.text import listed

if TYPE_CHECKING:
    from petals_eval.local_swarm import LocalSwarm
    from petals_eval.model import Adapter, LocalPart

__all__ = [
    "IN_MEMORY",
    "NO_ADAPTER",
    "Data",
    "Prepared",
    "Variant",
    "adapter_record",
    "answering_settings",
    "call_settings",
    "model_record",
    "options_of_run",
    "prepare",
    "prepare_run",
    "side_of_run",
]

NO_ADAPTER = "no prompts"
"""The journal's name for a model evaluated as it is."""
BYTES_AN_EXAMPLE = 500
"""What the journal and the predictions take for each, by which a disk is refused that is too full from the start."""
_FIRST_EXAMPLES = 50
"""Enough to know how long the examples are, on average."""

_PREPARED = (
    *("task", "data", "subset", "split", "token", "limit", "seed", "max_length", "unlabelled", "shard"),
    *("without_prompts", "fail_under", "fail_over", "max_failed", "tokens_per_micro_batch", "out", "save_texts"),
    "no_noise",
)
"""The settings of a run that `prepare` takes under their own names."""

_AS_THE_TASK_SAYS = PromptSettings()

_NOT_ANSWERING = (
    *("allow_nondeterministic", "window", "deadline", "verify", "request_timeout", "push", "generation_rows"),
    "cache_share",
)
"""The settings of calls that change no answer: a run may go on with others."""


"""What a manifest calls data that came from no file and from no hub; its fingerprint is that of the values."""

Data = str | Path | DataSource | Iterable[Mapping[str, object]]
"""What may be evaluated: a file, a hub name, a DataSource, or rows (`petals_eval.data.rows_of` says which)."""


class Variant(NamedTuple):
    """What is evaluated in turn. name: the journal's. task: with the shots of one draw, where there are any."""

    name: str
    adapter: "Adapter | None"
    task: Task


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that may begin.

    task: with the metrics that the thresholds need, and the shots of the first draw. rows: what all shards evaluate
    together; part: what this run does. first_examples: the first of part. side: our side of the model.
    variants: its adapters, or the model as it is, each with every draw of shots.
    manifest: of the run folder `out`; None: a new one below runs/. is_kept: otherwise the folder is temporary.
    local_swarm: not started; the one that the model's blocks will be on. notes: what a person should know of the rows.
    is_finished: the folder holds this very run, and nothing is left to be done.
    no_noise: no rows are computed again at the end.
    """

    task: Task
    rows: Rows
    part: Rows
    first_examples: tuple[Example, ...]
    side: LocalSide
    variants: tuple[Variant, ...]
    manifest: Manifest
    thresholds: tuple[Threshold, ...]
    tokens_per_micro_batch: int | None
    out: Path | None
    is_kept: bool
    local_swarm: "LocalSwarm | None" = None
    notes: tuple[str, ...] = ()
    is_finished: bool = False
    no_noise: bool = False

    @property
    def total(self) -> int:
        """How many examples are scored: each once for each variant."""
        return len(self.part) * len(self.variants)

    @property
    def seed(self) -> int:
        """Draws the sample, the examples that a lossy wire is measured on, and the bootstrap."""
        return self.manifest.seeds["sample"]

    @contextlib.contextmanager
    def open_folder(self) -> Iterator[RunFolder]:
        """Begin the run's folder, or go on with it. Raises RunFolderError, MachineError."""
        shard = self.manifest.data.shard
        name = self.task.name if shard is None else f"{self.task.name}-{shard[0]}of{shard[1]}"
        with contextlib.ExitStack() as stack:
            where: str | Path | None = self.out
            if not self.is_kept:
                where = stack.enter_context(tempfile.TemporaryDirectory(prefix="petals-eval-"))
            yield stack.enter_context(RunFolder.create(where, self.manifest, task=name))


def prepare(
    open_side: Callable[[], LocalSide],
    *,
    task: str | Path | Mapping[str, Any] | Task,
    data: Data | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    unlabelled: Unlabelled | None = None,
    shard: str | None = None,
    without_prompts: bool = False,
    prompt: PromptSettings = _AS_THE_TASK_SAYS,
    fail_under: Sequence[str] = (),
    fail_over: Sequence[str] = (),
    max_failed: int = 0,
    tokens_per_micro_batch: int | None = None,
    out: str | Path | None = None,
    is_kept: bool = True,
    save_texts: bool = False,
    no_noise: bool = False,
    more_metrics: Sequence[str] = (),
    may_be_finished: bool = False,
    **source_settings: Any,
) -> Prepared:
    """Read and check what a run needs: task, data, prompts, head, thresholds, folder.

    open_side: loads our side of the model; called once. source_settings: of `DataSource`, such as split; None among
    them is what the task says. more_metrics: to be computed besides the task's. may_be_finished: whether `out` may hold
    this run, finished. The others are those of `evaluate` and of `RunSettings`.

    Raises CallerError (its kinds say what is wrong), MachineError for what cannot be read or written here.
    """
    asked = with_prompt(_with_unlabelled(_with_max_length(load_task(task), max_length), unlabelled), prompt)
    if save_texts and asked.kind != "generation":
        raise ConfigError(f"--save-texts: task {asked.name} generates no texts; leave it out")
    code = row_code_of(asked, is_allowed=prompt.allow_task_code)
    thresholds = parse_thresholds(fail_under, fail_over, asked.label_names, kind=asked.kind)
    asked = _with_metrics(asked, [*(threshold.metric for threshold in thresholds), *more_metrics])
    check_parts(thresholds, asked.columns)
    piece = None if shard is None else Shard.parse(shard)
    is_finished = may_be_finished and out is not None and holds_finished(out)
    place = None if is_finished or not is_kept else Path(DEFAULT_PARENT if out is None else out)
    if out is not None and not is_finished:
        check_folder(out)
    if place is not None:
        check_room(place)
    given = _rows_or_source(asked, data, source_settings)
    source = None if isinstance(given, Rows) else given

    def read() -> RowsAndShots:
        loaded = given if isinstance(given, Rows) else load_rows(given)
        return rows_and_shots(asked, loaded, source, code, limit=limit, seed=seed, draws=prompt.draws)

    if source is None or is_local(source):
        found, side = read(), open_side()
    else:
        side, found = open_side(), read()
    rows = found.rows
    check_clusters(asked, rows)
    part = rows if piece is None else piece.of(rows)
    variants = _variants(side.adapters, without_prompts)
    if place is not None:
        check_room(place, BYTES_AN_EXAMPLE * len(part) * len(variants))
    for _, adapter in variants:
        _check_head(side.local, asked, adapter)
    asked = _bound(asked, side.local, [adapter for _, adapter in variants])
    tasks = _shown(asked, found, side.local.tokenizer)
    record = DataRecord(
        name=rows.name,
        fingerprint=rows.fingerprint,
        limit=limit,
        seed=seed,
        rows=len(rows),
        shard=None if piece is None else (piece.index, piece.count),
    )
    with_chat = isinstance(asked, Prompting) and asked.chat
    answering: dict[str, Any] = {"tokenizer_sha256": tokenizer_sha256(side.local.tokenizer, with_chat=with_chat)}
    if asked.kind == "generation":
        answering["end_tokens"] = sorted(side.local.end_tokens())
    if code is not None and code.sha256 is not None:
        answering["prepare_code"] = code.sha256
    if save_texts:  # a run that keeps texts keeps those of all rows: it does not go on with one that did not
        answering["save_texts"] = True
    manifest = _manifest(
        side,
        asked,
        record,
        _records(variants, len(tasks)),
        _fingerprint(asked, found),
        answering,
        {
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "rows_left_out": found.left_out,
            "fail_under": list(fail_under),
            "fail_over": list(fail_over),
            "max_failed": max_failed,
        },
    )
    if out is not None and is_finished:
        holds_finished(out, manifest)
    elif out is not None:
        check_folder(out, manifest)
    # Also what can only be told with the tokenizer at hand: that there is one, and that label words differ in it.
    first_examples = tuple(islice(tasks[0].examples(part, side.local.tokenizer), _FIRST_EXAMPLES))
    return Prepared(
        task=tasks[0],
        rows=rows,
        part=part,
        first_examples=first_examples,
        side=side,
        # The journal has the names that may be shared.
        variants=tuple(
            Variant(each.name, adapter, shown)
            for each, (adapter, shown) in zip(
                manifest.adapters, [(adapter, shown) for _, adapter in variants for shown in tasks], strict=True
            )
        ),
        manifest=manifest,
        thresholds=thresholds,
        tokens_per_micro_batch=tokens_per_micro_batch,
        out=None if out is None else Path(out),
        is_kept=is_kept,
        notes=(
            *rows.notes,
            *found.notes,
            *_no_answers(asked, rows),
            *_two_openings(first_examples, side.local.tokenizer),
        ),
        is_finished=is_finished,
        no_noise=no_noise,
    )


def _rows_or_source(task: Task, data: Data | None, settings: dict[str, Any]) -> Rows | DataSource:
    """Return rows that are at hand already, or from where they are read. Raises DataError, ConfigError."""
    if isinstance(data, DataSource):
        return data
    if data is None or isinstance(data, str | Path):
        return resolve_source(task, data, **settings)
    return rows_of(data, name=IN_MEMORY)


def prepare_run(settings: RunSettings) -> Prepared:
    """Prepare the run that the command was told of. Raises as `prepare` does."""
    open_side, swarms = side_of_run(settings)
    prepared = prepare(open_side, may_be_finished=True, **options_of_run(settings))
    return replace(prepared, local_swarm=swarms[0] if swarms else None)


def options_of_run(settings: RunSettings) -> dict[str, Any]:
    """Return what `prepare` is told of a command's settings."""
    as_they_are = {name: getattr(settings, name) for name in _PREPARED}
    return {"revision": settings.data_revision, "prompt": settings, **as_they_are}


def side_of_run(settings: RunSettings) -> "tuple[Callable[[], LocalSide], list[LocalSwarm]]":
    """Return what loads our side of the command's model, and a list that then has the swarm to be embedded, if any.

    Raises ConfigError, ModelError for what is wrong with the settings themselves.
    """
    from petals_eval.model.prompts import named_adapters
    from petals_eval.model.sources import Folder, open_source

    options = _local_options(settings)
    if isinstance(open_source(settings.model, error=ModelError), Folder) and settings.revision is not None:
        raise ModelError(f"{settings.model} is a folder, and a folder has no revision: leave --revision out.")
    check_names([name for name, _ in named_adapters(settings.adapter)])
    swarms: list[LocalSwarm] = []

    def open_side() -> LocalSide:
        from petals_eval.remote_model import check_home_blocks, default_dht_prefix, load_local

        local, adapters = load_local(settings.model, settings.adapter, **options)
        if settings.local_swarm is None:
            prefix = settings.dht_prefix or default_dht_prefix(settings.model, local.family)
        else:
            swarms.append(_local_swarm(settings))
            prefix = swarms[0].dht_prefix
        side = LocalSide(local, adapters, settings, prefix)
        if settings.verify_local is not None:
            check_home_blocks(settings.verify_local, side)
        return side

    return open_side, swarms


def _local_options(settings: RunSettings) -> dict[str, Any]:
    """Return how the local part is loaded. Raises ConfigError for a device that this machine or torch does not have."""
    check_device(settings.device)
    return {
        "revision": settings.revision,
        "token": settings.hub_token,
        "dtype": dtype_of(settings.dtype),
        "device": settings.device,
        "adapter_task": settings.adapter_task,
        "pool": settings.pool,
    }


def _local_swarm(settings: RunSettings) -> "LocalSwarm":
    """Return the embedded swarm that is asked for, not started. Raises ConfigError for a number of servers."""
    from petals_eval.local_swarm import LocalSwarm

    return LocalSwarm(
        settings.model,
        servers=settings.local_swarm or 1,
        dht_prefix=settings.dht_prefix,
        revision=settings.revision,
        token=settings.hub_token,
    )


def _with_max_length(task: Task, max_length: int | None) -> Task:
    if max_length is None:
        return task
    return _changed(task, "max_length", max_length, flag="--max-length")


def _with_unlabelled(task: Task, unlabelled: Unlabelled | None) -> Task:
    if unlabelled is None:
        return task
    if not isinstance(task, BaseModel) or not hasattr(task, "unlabelled"):
        raise ConfigError(f"--unlabelled: task {task.name} has no labels that could be missing.")
    changed = task.model_copy(update={"unlabelled": unlabelled})
    if isinstance(changed, Prompting) and (problem := changed.prompt_problem()):
        raise ConfigError(f"task {task.name}: {problem}.")
    return cast(Task, changed)


def _with_metrics(task: Task, names: Sequence[str]) -> Task:
    """Return the task with these metrics computed, too. Raises ConfigError, TaskError where it cannot have them."""
    if set(names) <= set(task.metrics):
        return task
    from petals_eval.metrics import check_metric_names

    metrics = check_metric_names([*task.metrics, *names], task.kind, label_names=task.label_names)
    return _changed(task, "metrics", metrics, flag="--fail-under and --fail-over")


def _changed(task: Task, name: str, value: object, *, flag: str) -> Task:
    """Return the task with another value of one of its keys.

    Raises ConfigError where it has no such key, TaskError where its definition does not take the value.
    """
    fields = type(task).model_fields if isinstance(task, BaseModel) else {}
    if not isinstance(task, BaseModel) or name not in fields:
        raise ConfigError(f"{flag}: task {task.name} has no {name} that could be changed")
    # Made anew and so validated: the new value may need what the task cannot give.
    given = {fields[key].alias or key: getattr(task, key) for key in task.model_fields_set}
    changed = type(task).model_validate({**given, name: value})
    if isinstance(task, Prompting) and isinstance(changed, Prompting):
        changed._folder = task._folder  # no key, and still needed for the module of its `prepare`
    return cast(Task, changed)


def _bound(task: Task, local: "LocalPart", adapters: "Sequence[Adapter | None]") -> Task:
    """Return the task for this model and the longest of the prompts: every variant is asked the same."""
    bound_to: Callable[[int | None], Task] | None = getattr(task, "bound_to", None)
    if bound_to is None:
        return task
    prefix = max((adapter.prefix_length for adapter in adapters if adapter is not None), default=0)
    return bound_to(None if local.context is None else local.context - prefix)


def _check_head(local: "LocalPart", task: Task, adapter: "Adapter | None") -> None:
    """Raise AdapterError, ModelError or TaskError where answers by the head that the task asks for could not be used.

    It may not be there, have another number of outputs, or be the model's own, whose config names them otherwise.
    """
    local.check_head(task.head, adapter)
    check_head_labels(task, local.own_label_names(adapter))
    outputs = local.class_outputs(adapter) if task.head == "class" else None
    if outputs is not None:
        getattr(task, "check_outputs", lambda shape: None)((outputs,))


def _no_answers(task: Task, rows: Rows) -> Iterator[str]:
    """Yield a sentence where rows need no answers and have no column of them: its name may be misspelt."""
    column = getattr(task, "label_column", None)
    if getattr(task, "unlabelled", "error") == "predict" and column is not None and column not in rows.columns:
        yield (
            f"{rows.name} has no column {column!r} of labels (its columns: {listed(map(repr, rows.columns))}): every "
            "row is predicted, and nothing is scored"
        )


def _two_openings(examples: "Sequence[Example]", tokenizer: Any) -> Iterator[str]:
    """Yield a sentence where texts begin twice."""
    bos = getattr(tokenizer, "bos_token_id", None)
    requests = [request for example in examples if example.error is None for request in example.requests]
    if bos is not None and any(list(request.input_ids[:2]) == [bos, bos] for request in requests):
        yield (
            "texts begin with more than one beginning-of-text token: the tokenizer puts one in front of what has one "
            "already, and `bos: never` in the task leaves it out"
        )


def _variants(adapters: "Sequence[Adapter]", without_prompts: bool) -> "list[tuple[str, Adapter | None]]":
    variants: list[tuple[str, Adapter | None]] = [(adapter.name, adapter) for adapter in adapters]
    if not variants:
        if without_prompts:
            raise ConfigError(
                "--without-prompts: expected tuned prompts to leave out, found no --adapter; leave it out"
            )
        return [(NO_ADAPTER, None)]
    if without_prompts:
        variants.append((WITHOUT_PROMPTS, adapters[0].without_prompts()))
    return variants


def _records(variants: "Sequence[tuple[str, Adapter | None]]", draws: int) -> list[AdapterRecord]:
    """Return the records of all variants, in their order; one of several draws has a name of its own."""
    found = []
    for name, adapter in variants:
        if draws == 1:
            found.append(adapter_record(name, adapter))
        for draw in range(1, draws + 1) if draws > 1 else ():
            drawn = f"{shareable_name(name)}, draw {draw}"  # shortened here: a name is cut at its slashes
            found.append(adapter_record(drawn, adapter, adapter_name=name, draw=draw))
    return found


def _shown(task: Task, found: RowsAndShots, tokenizer: Any) -> list[Task]:
    """Return the task with the shots of each draw, or as it is. Raises ModelError for a chat template that fails."""
    if not isinstance(task, Prompting):
        return [task]
    task.check_chat(tokenizer)
    return [task.showing(draw) for draw in found.draws] or [task]


def _fingerprint(task: Task, found: RowsAndShots) -> dict[str, Any]:
    """Return the task's fingerprint with that of the shots that were drawn."""
    whole: dict[str, Any] = task.fingerprint()
    if isinstance(task, Prompting) and found.draws:
        whole["shots"] = {**whole["shots"], "sha256": [draw.sha256 for draw in found.draws]}
    if (column := cluster_column(task)) is not None:
        whole["cluster_column"] = column
    return whole


def model_record(side: LocalSide) -> ModelRecord:
    """Return what a manifest says of the model."""
    local = side.local.fingerprint
    return ModelRecord(name=str(local["model"]), revision=local["revision"], sha256=str(local["sha256"]))


def adapter_record(
    name: str, adapter: "Adapter | None", *, adapter_name: str | None = None, draw: int | None = None
) -> AdapterRecord:
    """Return what a manifest says of an adapter, or of the model without any, under a name of the journal.

    adapter_name, draw: with several draws of shots, the adapter's own name and which draw it was.
    """
    kind, sha256 = ("none", "") if adapter is None else (adapter.kind, adapter.sha256)
    return AdapterRecord(name=name, kind=kind, sha256=sha256, adapter=adapter_name, draw=draw)


def answering_settings(side: LocalSide) -> dict[str, Any]:
    """Return what else of a model and its swarm changes answers, whoever asks."""
    local, settings = side.local, side.settings
    found = {
        "dtype": local.fingerprint["dtype"],
        "lm_head_sha256": local.fingerprint["lm_head_sha256"],
        "pool": local.pooling or "auto",
        "dht_prefix": side.dht_prefix,
        **{name: getattr(settings, name) for name in ("active_adapter", "require_dtype", "require_quant", "wire")},
    }
    if settings.lanes != "never":  # steps may round otherwise than calls
        found["lanes"] = settings.lanes
    if local.logit_cap is not None:
        found["logit_cap"] = local.logit_cap
    adapter_task = next((each.task for each in side.adapters if each.task is not None), None)
    return found if adapter_task is None else found | {"adapter_task": adapter_task}


def call_settings(settings: CallSettings) -> dict[str, Any]:
    """Return the settings of calls that change no answer."""
    servers = {"allow_servers": list(settings.allow_servers), "deny_servers": list(settings.deny_servers)}
    return servers | {name: getattr(settings, name) for name in _NOT_ANSWERING}


def _swarm_of(settings: CallSettings) -> dict[str, Any]:
    """Return which swarm the command was told of, without an address: a run folder keeps none."""
    if not isinstance(settings, ModelOnSwarm):
        return {}
    return {"local_swarm": settings.local_swarm, "public_swarm": settings.public_swarm}


def _manifest(
    side: LocalSide,
    task: Task,
    data: DataRecord,
    adapters: list[AdapterRecord],
    fingerprint: dict[str, Any],
    answering: dict[str, Any],
    running: dict[str, Any],
) -> Manifest:
    return Manifest.new(
        model=model_record(side),
        adapters=adapters,
        data=data,
        task={"name": task.name, **fingerprint},
        kind=task.kind,
        answer_columns=(*task.columns, *([] if cluster_column(task) is None else [CLUSTER])),
        answer_settings={
            "code": answering_code(),
            "task_code": task_code(task),
            **answering,
            **answering_settings(side),
        },
        run_settings={
            "metrics": list(task.metrics),
            "label_names": list(task.label_names),
            **call_settings(side.settings),
            **_swarm_of(side.settings),
            **running,
        },
        seeds={"sample": data.seed, "bootstrap": data.seed},
    )

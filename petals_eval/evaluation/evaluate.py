"""The evaluator: the one way through the house, from rows to a result, tied together."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.data import DataSource, load_rows, sample
from petals_eval.errors import CallerError, ConfigError, InterruptedRunError, MachineError, PetalsEvalError
from petals_eval.evaluation.scoring import Progress, Scoring
from petals_eval.evaluation.wire_error import note_sample
from petals_eval.runs.code_hash import answering_code, task_code
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import AdapterRecord, DataRecord, Manifest, ModelRecord
from petals_eval.runs.results import WITHOUT_PROMPTS, RunResult, run_result
from petals_eval.runs.shard import Shard
from petals_eval.tasks import Task, check_head_labels, load_task, resolve_source

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter, LocalPart
    from petals_eval.remote_model import RemoteModel

__all__ = ["NO_ADAPTER", "Progress", "check_head", "evaluate", "finish"]

NO_ADAPTER = "no prompts"
"""The journal's name for a model evaluated as it is."""


def evaluate(
    model: "RemoteModel | torch.nn.Module",
    *,
    task: str | Path | Task,
    data: str | Path | DataSource | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    without_prompts: bool = False,
    out: str | Path | None = None,
    tokens_per_micro_batch: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> RunResult:
    """Evaluate a model, with each of its adapters, on a task.

    model: a RemoteModel, or a Petals model with a head as it lives in a training loop: its embeddings, prompts and head
        as they are now, over our own connection to its swarm (`petals_eval.integrations.petals_model`).
    task: a shipped task's name, a YAML file, or a Task object.
    data: a file, a hub name or a DataSource; None: the task's own.
    limit, seed: evaluate this many examples, drawn by the seed; the seed also draws the bootstrap of the intervals.
    shard: "2/3" evaluates the second of three parts; `petals_eval.merge` joins their run folders.
    without_prompts: evaluate the first adapter's head without its prompts, too.
    out: the run folder; an unfinished run of the same settings in it goes on. None: nothing is kept.
    tokenizer: for a Petals model; None: the one that lies with the model its config names.

    The model is in the mode it was in before when this returns or raises; nothing here computes a gradient.
    An example that cannot be computed is a failure with its reason in the run folder, and is counted in the result
    (`n_failed`); it is never a wrong answer. Where none at all can be computed that is an error.

    Raises CallerError for what cannot work, SwarmError when the swarm cannot do it, MachineError for the disk,
    InterruptedRunError on Ctrl-C; what was scored by then is in the run folder.
    """
    task = load_task(task)
    source = data if isinstance(data, DataSource) else resolve_source(task, data)
    rows = sample(load_rows(source), limit, seed)
    part = None if shard is None else Shard.parse(shard)
    here = rows if part is None else part.of(rows)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_opened(model, tokenizer))
        retries_before = model.blocks.status().retries
        variants = _variants(model.adapters, without_prompts)
        for _, adapter in variants:
            check_head(model.local, task, adapter)
        data_record = DataRecord(
            name=rows.name,
            fingerprint=rows.fingerprint,
            limit=limit,
            seed=seed,
            rows=len(rows),
            shard=None if part is None else (part.index, part.count),
        )
        manifest = _manifest(model, task, data_record, variants, tokens_per_micro_batch)
        # The journal has the names that may be shared.
        variants = [(record.name, adapter) for record, (_, adapter) in zip(manifest.adapters, variants, strict=True)]
        where = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory(prefix="petals-eval-"))
        folder = stack.enter_context(RunFolder.create(where, manifest, task=task.name))
        run = Scoring(model, task, here, folder, progress, tokens_per_micro_batch, len(here) * len(variants))
        with _told_what_is_kept(run, kept=out is not None):
            if folder.resumed:
                run.say_what_is_left([name for name, _ in variants])
            note_sample(model, task, rows, variants[0], folder, seed=seed, on_tick=run.tick)
            run.score_all(variants)
            retries = model.blocks.status().retries - retries_before
            result = run_result(
                folder, task=task.name, metrics=task.metrics, label_names=task.label_names, retries=retries
            )
            finish(folder, result)
    return result


def check_head(local: "LocalPart", task: Task, adapter: "Adapter | None") -> None:
    """Raise AdapterError, ModelError or TaskError where the head that the task asks for is not there, or is the model's
    own and its config gives its outputs to other labels."""
    local.check_head(task.head, adapter)
    check_head_labels(task, local.own_label_names(adapter))


def finish(folder: RunFolder, result: RunResult) -> None:
    """Write what came of a run, the report too, and mark it as finished. Raises MachineError."""
    from petals_eval.report import markdown_report  # not above: it imports rich, which draws a random number

    folder.finish(result, report=markdown_report(result, folder.manifest, folder.journal.servers()))


def _opened(model: Any, tokenizer: Any) -> "contextlib.AbstractContextManager[RemoteModel]":
    """A RemoteModel as it is, and a Petals model as one."""
    if all(hasattr(model, name) for name in ("local", "blocks", "compute")):
        if tokenizer is not None:
            raise ConfigError("a RemoteModel has a tokenizer of its own: leave tokenizer= out")
        return contextlib.nullcontext(model)
    from petals_eval.integrations import petals_model

    return petals_model.opened(model, tokenizer=tokenizer)


@contextlib.contextmanager
def _told_what_is_kept(run: Scoring, *, kept: bool) -> Iterator[None]:
    """Whatever ends a run early, say how much of it is scored and how to go on."""
    try:
        yield
    except (PetalsEvalError, KeyboardInterrupt) as error:
        told = InterruptedRunError("interrupted") if isinstance(error, KeyboardInterrupt) else error
        scored = 0
        if kept:
            with contextlib.suppress(MachineError):  # a disk that takes no more may still be read, or not
                scored = run.folder.journal.committed() if isinstance(error, MachineError) else run.scored()
        if scored:
            # A mistake of the caller's would come back; whatever else ends a run, time or another swarm may help.
            how = "" if isinstance(error, CallerError) else " Run the same command again to go on."
            told.add_note(f"  {scored} of {run.total} examples are scored and kept in {run.folder.path}.{how}")
        raise told from error.__cause__


def _variants(adapters: Sequence["Adapter"], without_prompts: bool) -> "list[tuple[str, Adapter | None]]":
    """What is evaluated in turn, under the name the journal gives it."""
    variants: list[tuple[str, Adapter | None]] = [(adapter.name, adapter) for adapter in adapters]
    if not variants:
        return [(NO_ADAPTER, None)]
    if without_prompts:
        variants.append((WITHOUT_PROMPTS, adapters[0].without_prompts()))
    return variants


def _manifest(
    model: "RemoteModel",
    task: Task,
    data: DataRecord,
    variants: "list[tuple[str, Adapter | None]]",
    tokens_per_micro_batch: int | None,
) -> Manifest:
    local = model.local.fingerprint
    records = [
        AdapterRecord(
            name=name,
            kind="none" if adapter is None else adapter.kind,
            sha256="" if adapter is None else adapter.sha256,
        )
        for name, adapter in variants
    ]
    return Manifest.new(
        model=ModelRecord(name=str(local["model"]), revision=local["revision"], sha256=str(local["sha256"])),
        adapters=records,
        data=data,
        task={"name": task.name, **task.fingerprint()},  # type: ignore[dict-item]
        answer_settings={
            "code": answering_code(),
            "task_code": task_code(task),
            "dtype": local["dtype"],
            "lm_head_sha256": local["lm_head_sha256"],
            "pool": model.local.pooling or "auto",
            "active_adapter": model.blocks.settings.active_adapter,
            "dht_prefix": model.blocks.dht_prefix,
            "require_dtype": model.blocks.settings.require_dtype,
            "require_quant": model.blocks.settings.require_quant,
            "wire": model.blocks.settings.wire,
        },
        run_settings={
            "metrics": list(task.metrics),
            "label_names": list(task.label_names),
            "allow_nondeterministic": model.blocks.settings.allow_nondeterministic,
            "allow_servers": list(model.blocks.settings.allow_servers),
            "deny_servers": list(model.blocks.settings.deny_servers),
            "window": model.blocks.settings.window,
            "deadline": model.blocks.settings.deadline,
            "verify": model.blocks.settings.verify,
            "request_timeout": model.blocks.settings.request_timeout,
            "push": model.blocks.settings.push,
            "tokens_per_micro_batch": tokens_per_micro_batch,
        },
        seeds={"sample": data.seed, "bootstrap": data.seed},
    )

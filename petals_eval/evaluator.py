"""The evaluator: the one way through the house, from rows to a result, tied together."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from petals_eval.data import DataSource, Rows, load_rows, sample
from petals_eval.errors import CallerError, ConfigError, InterruptedRunError, MachineError, PetalsEvalError, SwarmError
from petals_eval.lossy_wire import note_lossless_servers, note_sample
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import AdapterRecord, DataRecord, Manifest, ModelRecord, NoisyServer, ServerUsed
from petals_eval.runs.results import WITHOUT_PROMPTS, RunResult, computed_in, summarise
from petals_eval.tasks import Task, load_task, resolve_source
from petals_eval.tasks.requests import Example, Request

if TYPE_CHECKING:
    import torch

    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel
    from petals_eval.swarm import SwarmStatus

__all__ = ["NO_ADAPTER", "Progress", "evaluate"]

_log = logging.getLogger("petals_eval")

NO_ADAPTER = "no prompts"
"""The journal's name for a model evaluated as it is."""


class Progress(Protocol):
    """Who wants to know how far an evaluation is."""

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None: ...

    def waiting(self, message: str) -> None: ...


@dataclass(slots=True)
class _Open:
    """An example some of whose answers are still on their way."""

    example: Example
    answers: "dict[int, torch.Tensor]" = field(default_factory=dict)
    servers: set[ServerUsed] = field(default_factory=set)


def evaluate(
    model: "RemoteModel | torch.nn.Module",
    *,
    task: str | Path | Task,
    data: str | Path | DataSource | None = None,
    limit: int | None = None,
    seed: int = 0,
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
    without_prompts: evaluate the first adapter's head without its prompts, too.
    out: the run folder; an unfinished run of the same settings in it goes on. None: nothing is kept.
    tokenizer: for a Petals model; None: the one that lies with the model its config names.

    The model is in the mode it was in before when this returns or raises; nothing here computes a gradient.
    Raises CallerError for what cannot work, SwarmError when the swarm cannot do it, MachineError for the disk,
    InterruptedRunError on Ctrl-C; what was scored by then is in the run folder.
    """
    task = load_task(task)
    source = data if isinstance(data, DataSource) else resolve_source(task, data)
    rows = sample(load_rows(source), limit, seed)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_opened(model, tokenizer))
        retries_before = model.blocks.status().retries
        variants = _variants(model.adapters, without_prompts)
        manifest = _manifest(model, task, rows, limit, seed, variants, tokens_per_micro_batch)
        where = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory(prefix="petals-eval-"))
        folder = stack.enter_context(RunFolder.create(where, manifest, task=task.name))
        run = _Run(model, task, rows, folder, progress, tokens_per_micro_batch, len(rows) * len(variants))
        with _told_what_is_kept(run, kept=out is not None):
            note_sample(model, task, rows, variants[0], folder, seed=seed, on_tick=run.tick)
            run.score_all(variants)
        used = folder.journal.servers()
        results = {
            name: summarise(folder.journal, name, task.metrics, task.label_names, seed=seed) for name, _ in variants
        }
        result = RunResult(
            task=task.name,
            without_prompts=results.pop(WITHOUT_PROMPTS, None),
            adapters=results,
            retries=model.blocks.status().retries - retries_before,
            servers=len({server.peer_id for server, _ in used}),
            computed_in=computed_in(used),
            noisy_servers=folder.manifest.noisy_servers,
            wire=folder.manifest.wire,
        )
        from petals_eval.report import markdown_report  # not above: it imports rich, which draws a random number

        folder.finish(result, report=markdown_report(result, folder.manifest, used))
    return result


def _opened(model: Any, tokenizer: Any) -> "contextlib.AbstractContextManager[RemoteModel]":
    """A RemoteModel as it is, and a Petals model as one."""
    if all(hasattr(model, name) for name in ("local", "blocks", "compute")):
        if tokenizer is not None:
            raise ConfigError("a RemoteModel has a tokenizer of its own: leave tokenizer= out")
        return contextlib.nullcontext(model)
    from petals_eval.integrations import petals_model

    return petals_model.opened(model, tokenizer=tokenizer)


class _Run:
    """The state of one evaluation under way."""

    def __init__(
        self,
        model: "RemoteModel",
        task: Task,
        rows: Rows,
        folder: RunFolder,
        progress: Progress | None,
        tokens_per_micro_batch: int | None,
        total: int,
    ):
        self.model = model
        self.task = task
        self.rows = rows
        self.folder = folder
        self.progress = progress
        self.options = {} if tokens_per_micro_batch is None else {"tokens_per_micro_batch": tokens_per_micro_batch}
        self.total = total
        self.done = 0
        self.distrusted: set[str] = set()
        self._said: set[str] = set()
        self._withdrawn = False
        self._disputed: set[str] = set()

    def score_all(self, variants: "Sequence[tuple[str, Adapter | None]]") -> None:
        """Score the variants in turn, and once more what servers had computed that were caught later."""
        from petals_eval.swarm.unequal import dropout_text

        dropout = self.model.config_dropout
        if dropout:
            self.say(
                f"note: this model's config has {dropout_text(dropout)}, and Petals servers leave dropout on: each is "
                "asked one question twice before it is used"
            )
        try:
            while True:
                self.done, self._withdrawn = 0, False
                for name, adapter in variants:
                    self.score(name, adapter)
                self.model.blocks.settle(on_tick=self.tick)
                if not self._withdrawn:
                    return
        except (SwarmError, CallerError, KeyboardInterrupt):
            self.tick()  # what a server scored that was caught in the last moment must not stay
            raise

    def score(self, name: str, adapter: "Adapter | None") -> None:
        """Score every example that the journal does not hold yet, as answers come back."""
        journal = self.folder.journal
        done_before = journal.done_keys(name)
        self.done += len(done_before)
        open_examples: dict[str, _Open] = {}

        def requests() -> Iterator[Request]:
            for example in self.task.examples(self.rows, self.model.local.tokenizer):
                if example.key not in done_before:
                    open_examples[example.key] = _Open(example)
                    yield from example.requests

        answers_as_they_come = self.model.compute(requests(), adapter, on_tick=self.tick, **self.options)
        # Closed by name: while somebody keeps an exception from in here, what is in flight would go on.
        with journal.session(name), contextlib.closing(answers_as_they_come):
            for answered in answers_as_they_come:
                waiting = open_examples[answered.request.key]
                waiting.answers[answered.request.part] = answered.answer
                waiting.servers.update(
                    ServerUsed(hop.peer_id, hop.first, hop.last, hop.version, hop.dtype, hop.quant)
                    for hop in answered.hops
                )
                if len(waiting.answers) < len(waiting.example.requests):
                    continue
                del open_examples[answered.request.key]
                if not self.distrusted.isdisjoint(server.peer_id for server in waiting.servers):
                    self._withdrawn = True  # on its way when its server was caught: computed again like the rest
                    continue
                example = waiting.example
                answers = [waiting.answers[part] for part in range(len(example.requests))]
                prediction = self.task.predict(example, answers)
                journal.add(name, prediction, truncated=example.truncated, servers=tuple(waiting.servers))
                self.done += 1
        self.tick()

    def scored(self) -> int:
        """Examples in the journal, those of adapters that this pass has not come to among them."""
        journal = self.folder.journal
        return sum(journal.counts(name).scored for name in journal.adapters())

    def tick(self) -> None:
        """Called a few times a second, also while nothing comes back."""
        self.folder.journal.flush_if_due()
        status = self.model.blocks.status()
        self._distrust(status)
        for notice in (*status.notices, *note_lossless_servers(self.model, self.folder)):
            if notice not in self._said:
                self._said.add(notice)
                self.say(notice)
        if self.progress is None:
            return
        if status.waiting is not None:
            self.progress.waiting(f"waiting for the swarm: {status.waiting}")
        else:
            self.progress.update(self.done, status.retries, len(status.servers))

    def say(self, line: str) -> None:
        """A line for a person, once."""
        if self.progress is None:
            _log.warning(line)
        else:
            status = self.model.blocks.status()
            self.progress.update(self.done, status.retries, len(status.servers), message=line)

    def _distrust(self, status: "SwarmStatus") -> None:
        """Note the servers whose answers differ, and withdraw what was scored by those that are left out."""
        disputed = {each.server.peer_id for each in status.unequal if each.verdict == "disputed"}
        cleared, self._disputed = self._disputed - disputed, disputed
        if not status.unequal:
            return
        caught = {each.server.peer_id for each in status.unequal if not each.is_used}
        if caught - self.distrusted:
            withdrawn = self.folder.journal.withdraw(caught - self.distrusted)
            self.done = max(0, self.done - withdrawn)
            self._withdrawn = self._withdrawn or withdrawn > 0
        self.distrusted = caught
        self.folder.note_noisy(
            (
                NoisyServer(
                    each.server.peer_id,
                    each.server.start,
                    each.server.end,
                    each.server.record.version,
                    each.difference,
                    each.is_used,
                    each.verdict,
                )
                for each in status.unequal
            ),
            cleared=cleared,
        )


@contextlib.contextmanager
def _told_what_is_kept(run: _Run, *, kept: bool) -> Iterator[None]:
    """Whatever ends a run early, say how much of it is scored and how to go on."""
    try:
        yield
    except (PetalsEvalError, KeyboardInterrupt) as error:
        told = InterruptedRunError("interrupted") if isinstance(error, KeyboardInterrupt) else error
        scored = run.scored() if kept and not isinstance(error, MachineError) else 0
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
    rows: Rows,
    limit: int | None,
    seed: int,
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
        data=DataRecord(name=rows.name, fingerprint=rows.fingerprint, limit=limit, seed=seed),
        task={"name": task.name, **task.fingerprint()},  # type: ignore[dict-item]
        answer_settings={
            "dtype": local["dtype"],
            "lm_head_sha256": local["lm_head_sha256"],
            "active_adapter": model.blocks.settings.active_adapter,
            "dht_prefix": model.blocks.dht_prefix,
            "require_dtype": model.blocks.settings.require_dtype,
            "require_quant": model.blocks.settings.require_quant,
            "wire": model.blocks.settings.wire,
        },
        run_settings={
            "metrics": list(task.metrics),
            "allow_nondeterministic": model.blocks.settings.allow_nondeterministic,
            "allow_servers": list(model.blocks.settings.allow_servers),
            "deny_servers": list(model.blocks.settings.deny_servers),
            "window": model.blocks.settings.window,
            "deadline": model.blocks.settings.deadline,
            "verify": model.blocks.settings.verify,
            "request_timeout": model.blocks.settings.request_timeout,
            "tokens_per_micro_batch": tokens_per_micro_batch,
        },
        seeds={"sample": seed, "bootstrap": seed},
    )

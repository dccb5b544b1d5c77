"""Models whose blocks run here, and what they are asked: a Hugging Face model, or one with tuned prompts on a task."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from petals_eval.config import CallSettings
from petals_eval.data.batching import MicroBatch
from petals_eval.errors import ConfigError, ModelError
from petals_eval.evaluation.prepare import Prepared, prepare
from petals_eval.model.adapter import Adapter
from petals_eval.model.blocks import BlockSpan, added_prompts
from petals_eval.model.local import LocalPart
from petals_eval.remote_model import LocalSide, load_local
from petals_eval.tasks.requests import Request
from petals_eval.two_modes.settings import ModesSettings

__all__ = ["OnTask", "PromptedClassifier", "model_and_input", "on_task"]

_ROWS_AT_ONCE = 32


def model_and_input(name: str, revision: str | None, text: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model with its own head, or as a language model, and make its input of a text.

    name: hub name or folder. Raises ModelError.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        is_classifier = any("SequenceClassification" in each for each in config.architectures or ())
        kind: Any = (
            transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
        )
        model: nn.Module = kind.from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"expected a model of transformers at {name}, with its tokenizer; found: {lines[0]}"
        ) from error
    return model, dict(tokenizer(text, return_tensors="pt"))


class PromptedClassifier(nn.Module):
    """A model with tuned prompts and their head, all of it here: texts of one length, int64 (rows, seq), to class
    logits (rows, labels).

    It computes what a run computes over a swarm: the same local part, Hugging Face's blocks, deep prompts added as a
    Petals server does. Prompts are parameters, and the rest asks for no gradients.
    """

    def __init__(self, local: LocalPart, span: BlockSpan, adapter: Adapter | None):
        super().__init__()
        self.local = local.requires_grad_(False)
        self.blocks = span.module
        self._each_block, self._dtype = span.blocks, span.dtype
        self._adapter = adapter
        if adapter is not None and adapter.prompts is not None:
            self.prompts = nn.Parameter(adapter.prompts.clone())
            self._adapter = replace(adapter, prompts=self.prompts)
        if adapter is not None and adapter.deep_prompts is not None:
            self.deep_prompts = nn.Parameter(adapter.deep_prompts.clone())

    @property
    def saved_in_half(self) -> tuple[str, ...]:
        """The prompts whose values are all those of half precision: they were saved in it, and perhaps trained so."""
        return tuple(
            name
            for name, tensor in self.named_parameters()
            if tensor.requires_grad
            and bool(tensor.any())
            and any(torch.equal(tensor.to(dtype).float(), tensor) for dtype in (torch.float16, torch.bfloat16))
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the class logits, float32. Raises AdapterError where there is no trained head."""
        hidden = self.local.embed(input_ids, self._adapter).to(self._dtype)
        # Petals rounds prompts to the embeddings' dtype before a server gets them.
        deep: nn.Parameter | None = getattr(self, "deep_prompts", None)
        rounded = None if deep is None else deep.to(self.local.dtype).to(self._dtype)
        with nullcontext() if rounded is None else added_prompts(self._each_block, rounded):
            hidden = self.blocks(inputs_embeds=hidden, use_cache=False).last_hidden_state
        batch = MicroBatch.of(Request(str(row), 0, tuple(ids)) for row, ids in enumerate(input_ids.tolist()))
        return torch.stack(self.local.head(hidden, batch, self._adapter))


@dataclass(frozen=True, eq=False)
class OnTask:
    """What is to be asked of each adapter, or of the model as it is.

    models: by the adapter's name. input_ids: the first text of the data, int64 (1, seq). batches: the evaluation set,
    texts of one length (rows, seq) with their labels (rows,). label_names: of the classes.
    """

    models: dict[str, PromptedClassifier]
    input_ids: torch.Tensor
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    label_names: tuple[str, ...]


def on_task(settings: ModesSettings) -> OnTask:
    """Load a model with all of its blocks, its adapters, and the rows of a task for a trained head.

    Raises what is wrong with them as a run does, and ConfigError for a task of another kind.
    """
    name, task = str(settings.model), settings.task
    if task is None:
        raise ConfigError(
            "expected --task beside --adapter, --data, --limit and --dropout: its rows are what is answered."
        )

    def open_side() -> LocalSide:
        local, adapters = load_local(name, settings.adapter, revision=settings.revision)
        return LocalSide(local, adapters, CallSettings(), "")

    prepared = prepare(
        open_side, task=task, data=settings.data, limit=settings.limit, seed=settings.seed, is_kept=False
    )
    if prepared.task.kind != "classification" or getattr(prepared.task, "label_words", None):
        raise ConfigError(f"--task: expected a classification by a trained head; {prepared.task.name} is another kind.")
    local = prepared.side.local
    span = BlockSpan.load(name, 0, local.num_blocks, local.dtype, revision=settings.revision)
    if settings.dropout is not None:
        span.drop_out(settings.dropout)
    batches = list(_batches(prepared))
    return OnTask(
        models={
            "the model as it is" if each is None else each.name: PromptedClassifier(local, span, each)
            for each in prepared.side.adapters or (None,)
        },
        input_ids=torch.tensor([prepared.first_examples[0].requests[0].input_ids]),
        batches=batches,
        label_names=prepared.task.label_names,
    )


def _batches(prepared: Prepared) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows that have a label, those of one length together: none is padded."""
    examples = [
        (each.requests[0].input_ids, int(each.label))
        for each in prepared.task.examples(prepared.part, prepared.side.local.tokenizer)
        if each.label is not None and each.requests
    ]
    for _, alike in groupby(sorted(examples, key=lambda each: len(each[0])), key=lambda each: len(each[0])):
        yield from _in_parts(list(alike))


def _in_parts(alike: list[tuple[tuple[int, ...], int]]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(alike), _ROWS_AT_ONCE):
        ids, labels = zip(*alike[start : start + _ROWS_AT_ONCE], strict=True)
        yield torch.tensor(ids), torch.tensor(labels)

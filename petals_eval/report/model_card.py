"""The results of a run as the model card of the Hugging Face hub has them: its `model-index`."""

from pathlib import Path
from typing import TYPE_CHECKING

from petals_eval.metrics import title_of
from petals_eval.runs import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

__all__ = ["model_card_data"]

_TASK_TYPES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "choice": "multiple-choice",
}
"""The hub's names of kinds of tasks; the others generate texts or measure how likely they are."""

_AVERAGES = ("macro", "micro", "weighted")
_METRICS = {
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "token_perplexity": "perplexity",
    "balanced_accuracy": "balanced_accuracy",
}
"""Metrics that `evaluate`, the hub's library, has under another name."""


def model_card_data(folder: str | Path, *, model_name: str | None = None) -> "ModelCardData":
    """Return the metadata of a model card for the first adapter of a run, with its metrics as the hub's `model-index`.

    folder: of the run. model_name: of what was evaluated; None: the adapter's name. `str(...)` of what is returned is
    the YAML between the lines `---` of a README.md; `ModelCard.from_template(...)` makes a card of it.
    Metrics of single labels, and those without a value, are left out: their place is in the run folder.
    Raises RunFolderError, MachineError.
    """
    from huggingface_hub import EvalResult, ModelCardData

    with RunFolder.open(folder) as opened:
        result, manifest = opened.result(), opened.manifest
    data = manifest.data
    results: list[EvalResult] = []
    for name, metric in result.metrics.items():
        if metric.value is None or "[" in name or name == "majority_baseline":
            continue
        base, _, average = name.rpartition("_")
        is_average = average in _AVERAGES
        results.append(
            EvalResult(
                task_type=_TASK_TYPES.get(result.kind, "text-generation"),
                task_name=result.task,
                dataset_type=data.name,
                dataset_name=data.name,
                metric_type=base if is_average else _METRICS.get(name, name),
                metric_name=title_of(name),
                metric_value=metric.value,
                metric_args={"average": average} if is_average else None,
            )
        )
    named = model_name or result.first.adapter
    base_model = manifest.model.name if manifest.model.revision else None  # a local folder has no name on the hub
    return ModelCardData(model_name=named, base_model=base_model, eval_results=results)

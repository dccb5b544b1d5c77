"""petals-eval: evaluate prompt-tuned language models whose transformer blocks run on a Petals swarm.

    import petals_eval

    with petals_eval.RemoteModel.from_pretrained("bigscience/bloom", adapter="./prompts", initial_peers=peers) as model:
        result = petals_eval.evaluate(model, task="sst2")
    result.metrics["accuracy"].value, result.metrics["accuracy"].ci95

Names are imported when first used: `petals-eval --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from petals_eval.lazy_imports import put_off_imports

if TYPE_CHECKING:
    from petals_eval import errors
    from petals_eval.comparison.compare import Comparison, compare
    from petals_eval.config import PUBLIC_SWARM, SwarmSettings
    from petals_eval.data import DataSource
    from petals_eval.evaluation.batches import evaluate_batches
    from petals_eval.evaluation.evaluate import evaluate
    from petals_eval.evaluation.merge import merge
    from petals_eval.health import HealthReport, check_health
    from petals_eval.local_swarm import LocalSwarm
    from petals_eval.remote_model import RemoteModel
    from petals_eval.report.model_card import model_card_data
    from petals_eval.runs.analysed_runs import errors_of
    from petals_eval.runs.error_analysis import ErrorAnalysis
    from petals_eval.runs.group_result import GroupResult
    from petals_eval.runs.overview import load_runs
    from petals_eval.runs.results import AdapterResult, RunResult
    from petals_eval.swarm import RemoteSequential, SwarmConnection
    from petals_eval.tasks import (
        ChoiceTask,
        ClassificationTask,
        ContinuationTask,
        GenerationTask,
        PerplexityTask,
        RegressionTask,
        TaskGroup,
    )
    from petals_eval.two_modes.compare import modes

__version__ = "0.1.0"

__all__ = [
    "PUBLIC_SWARM",
    "AdapterResult",
    "ChoiceTask",
    "ClassificationTask",
    "Comparison",
    "ContinuationTask",
    "DataSource",
    "ErrorAnalysis",
    "GenerationTask",
    "GroupResult",
    "HealthReport",
    "LocalSwarm",
    "PerplexityTask",
    "RegressionTask",
    "RemoteModel",
    "RemoteSequential",
    "RunResult",
    "SwarmConnection",
    "SwarmSettings",
    "TaskGroup",
    "__version__",
    "check_health",
    "compare",
    "errors",
    "errors_of",
    "evaluate",
    "evaluate_batches",
    "load_runs",
    "merge",
    "model_card_data",
    "modes",
]

_HOMES = {
    "Comparison": "petals_eval.comparison.compare",
    "compare": "petals_eval.comparison.compare",
    "PUBLIC_SWARM": "petals_eval.config",
    "SwarmSettings": "petals_eval.config",
    "DataSource": "petals_eval.data",
    "LocalSwarm": "petals_eval.local_swarm",
    "RemoteModel": "petals_eval.remote_model",
    "AdapterResult": "petals_eval.runs.results",
    "ErrorAnalysis": "petals_eval.runs.error_analysis",
    "errors_of": "petals_eval.runs.analysed_runs",
    "GroupResult": "petals_eval.runs.group_result",
    "RunResult": "petals_eval.runs.results",
    "load_runs": "petals_eval.runs.overview",
    "model_card_data": "petals_eval.report.model_card",
    "evaluate": "petals_eval.evaluation.evaluate",
    "evaluate_batches": "petals_eval.evaluation.batches",
    "merge": "petals_eval.evaluation.merge",
    "modes": "petals_eval.two_modes.compare",
    "HealthReport": "petals_eval.health",
    "check_health": "petals_eval.health",
    "RemoteSequential": "petals_eval.swarm",
    "SwarmConnection": "petals_eval.swarm",
    "ChoiceTask": "petals_eval.tasks",
    "ClassificationTask": "petals_eval.tasks",
    "ContinuationTask": "petals_eval.tasks",
    "GenerationTask": "petals_eval.tasks",
    "PerplexityTask": "petals_eval.tasks",
    "RegressionTask": "petals_eval.tasks",
    "TaskGroup": "petals_eval.tasks",
}


put_off_imports()


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("petals_eval.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'petals_eval' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

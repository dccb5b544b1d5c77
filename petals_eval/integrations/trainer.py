"""An evaluation after each epoch of a `transformers.Trainer`, its metrics in the trainer's own log.

from petals_eval.integrations.trainer import EvaluationCallback

trainer.add_callback(EvaluationCallback(trainer, task="sst2", limit=500))
trainer.train()
"""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from petals_eval.evaluation.evaluate import evaluate
from petals_eval.runs import GroupResult, RunResult
from petals_eval.tracking.logged import logged_values

__all__ = ["EvaluationCallback"]


class EvaluationCallback(TrainerCallback):
    """Evaluates the model that a Trainer trains, as it is at the end of each epoch.

    trainer: whose log takes the numbers, each under its name in `petals_eval.tracking`, such as `sst2/accuracy` and
        `sst2/accuracy_low`; so they are in `trainer.state.log_history` and wherever the trainer reports to.
    out: a folder that gets the run folder of each epoch, `epoch-1` first. None: nothing is kept.
    options: what `petals_eval.evaluate` takes beside the model: task, data, limit and so on.

    results: of the epochs so far. The model stays as it was, as with `petals_eval.evaluate`, and an evaluation that
    fails ends the training with its reason. Of several processes only the first one evaluates.
    """

    def __init__(self, trainer: Trainer, *, out: str | Path | None = None, **options: Any):
        self._trainer, self._out, self._options = trainer, out, options
        self.results: list[RunResult | GroupResult] = []

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate, and log. Raises as `petals_eval.evaluate` does."""
        if not state.is_world_process_zero:
            return
        epoch = round(state.epoch or 0)
        out = None if self._out is None else Path(self._out) / f"epoch-{epoch}"
        result = evaluate(kwargs["model"], out=out, **self._options)
        self.results.append(result)
        tasks = result.tasks.values() if isinstance(result, GroupResult) else [result]
        self._trainer.log({name: value for each in tasks for name, value in logged_values(each).items()})

"""Thresholds that a result has to reach, and those that it missed."""

from collections.abc import Sequence
from dataclasses import dataclass

from petals_eval.errors import ConfigError
from petals_eval.metrics import METRICS, available_metrics, check_metric_names
from petals_eval.runs.results import AdapterResult, RunResult

__all__ = ["Threshold", "missed"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """The least that a metric must reach.

    name: of a metric, or of one label's part of it, such as "recall[human]".
    """

    name: str
    minimum: float

    @classmethod
    def parse(cls, text: str, label_names: Sequence[str], kind: str = "classification") -> "Threshold":
        """Read "accuracy=0.7", of a task of this kind.

        Raises ConfigError for a metric that is unknown, has no number or is better when lower, and for a number that
        none can reach.

        >>> Threshold.parse("f1_macro=0.5", ("no", "yes"))
        Threshold(name='f1_macro', minimum=0.5)
        """
        name, equals, number = text.rpartition("=")
        try:
            found = cls(name.strip(), float(number))
        except ValueError:
            found = cls("", 0.0)
        if not equals or not found.name or found.minimum != found.minimum:
            raise ConfigError(f"fail_under: expected METRIC=NUMBER such as accuracy=0.7; found {text!r}")
        name = found.metric if found.metric in available_metrics(kind) else found.name
        spec = METRICS[check_metric_names([name], kind)[0]]
        if found.name not in spec.names(label_names) or spec.name == "confusion_matrix":
            known = ", ".join(spec.names(label_names))
            raise ConfigError(f"fail_under: {found.name} is not a single number. Expected one such as {known}.")
        if not spec.higher_is_better:
            raise ConfigError(f"fail_under: {found.name} is better when it is lower, so nothing can be below it.")
        if found.minimum > 1:  # all that are better when higher end there
            raise ConfigError(
                f"fail_under: expected at most 1, the best {found.name} there is; found {found.minimum:g}."
            )
        return found

    @property
    def metric(self) -> str:
        """What a task has to list for it: "recall_per_class" for "recall[human]"."""
        score, bracket, _ = self.name.partition("[")
        return f"{score}_per_class" if bracket else self.name


def missed(result: RunResult, thresholds: Sequence[Threshold], max_failed: int) -> list[str]:
    """Return a line for each threshold that an adapter missed.

    Failures without the prompts count, their metrics do not.
    """
    lines = []
    everything = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
    for each in everything:
        if each.n_failed > max_failed:
            lines.append(
                f"below the bar{_whose(each, everything)}: {each.n_failed} of {each.n_examples} examples failed, "
                f"--max-failed allows {max_failed}; failures.jsonl says why"
            )
    adapters = list(result.adapters.values())
    for adapter in adapters:
        for threshold in thresholds:
            metric = adapter.metrics.get(threshold.name)
            value = None if metric is None else metric.value
            if value is None or value < threshold.minimum:
                found = "has no value" if value is None else f"is {value:.4f}"
                lines.append(
                    f"below the bar{_whose(adapter, adapters)}: {threshold.name} {found}, --fail-under asks for "
                    f"{threshold.minimum:g}"
                )
    return lines


def _whose(result: AdapterResult, among: Sequence[AdapterResult]) -> str:
    return f" ({result.adapter})" if len(among) > 1 else ""

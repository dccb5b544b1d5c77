"""Bars that a result has to clear, and those it did not."""

from collections.abc import Sequence
from dataclasses import dataclass

from petals_eval.errors import ConfigError
from petals_eval.metrics import METRICS, check_metric_names
from petals_eval.runs.results import RunResult

__all__ = ["Bar", "below"]


@dataclass(frozen=True, slots=True)
class Bar:
    """The least that a metric must reach.

    name: of a metric, or of one label's part of it, such as "recall[human]".
    """

    name: str
    least: float

    @classmethod
    def parse(cls, text: str, label_names: Sequence[str]) -> "Bar":
        """Of "accuracy=0.7". Raises ConfigError for a metric that is unknown, has no number or is better when
        lower, and for a number that none can reach.

        >>> Bar.parse("f1_macro=0.5", ("no", "yes"))
        Bar(name='f1_macro', least=0.5)
        """
        name, equals, number = text.rpartition("=")
        try:
            bar = cls(name.strip(), float(number))
        except ValueError:
            bar = cls("", 0.0)
        if not equals or not bar.name or bar.least != bar.least:
            raise ConfigError(f"fail_under: expected METRIC=NUMBER such as accuracy=0.7; found {text!r}")
        spec = METRICS[bar.metric] if bar.metric in METRICS else METRICS[check_metric_names([bar.name])[0]]
        if bar.name not in spec.names(label_names) or spec.name == "confusion_matrix":
            known = ", ".join(spec.names(label_names))
            raise ConfigError(f"fail_under: {bar.name} is not a single number. Expected one such as {known}.")
        if not spec.higher_is_better:
            raise ConfigError(f"fail_under: {bar.name} is better when it is lower, so nothing can be below it.")
        if bar.least > 1:  # all that are better when higher end there
            raise ConfigError(f"fail_under: expected at most 1, the best {bar.name} there is; found {bar.least:g}.")
        return bar

    @property
    def metric(self) -> str:
        """What a task has to list for it: "recall_per_class" of "recall[human]"."""
        score, bracket, _ = self.name.partition("[")
        return f"{score}_per_class" if bracket else self.name


def below(result: RunResult, bars: Sequence[Bar], max_failed: int) -> list[str]:
    """A line for each bar that an adapter did not clear. Failures without the prompts count, its metrics do not."""
    lines = []
    everything = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
    for each in everything:
        whose = f" ({each.adapter})" if len(everything) > 1 else ""
        if each.n_failed > max_failed:
            lines.append(
                f"below the bar{whose}: {each.n_failed} of {each.n_examples} examples failed, --max-failed allows "
                f"{max_failed}; failures.jsonl says why"
            )
    for adapter in result.adapters.values():
        whose = f" ({adapter.adapter})" if len(result.adapters) > 1 else ""
        for bar in bars:
            metric = adapter.metrics.get(bar.name)
            if metric is None or metric.value is None:
                lines.append(f"below the bar{whose}: {bar.name} has no value, --fail-under asks for {bar.least:g}")
            elif metric.value < bar.least:
                lines.append(
                    f"below the bar{whose}: {bar.name} is {metric.value:.4f}, --fail-under asks for {bar.least:g}"
                )
    return lines

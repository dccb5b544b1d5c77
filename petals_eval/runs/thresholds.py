"""Thresholds that a result has to keep to, and those that it missed."""

from collections.abc import Sequence
from dataclasses import dataclass

from petals_eval.errors import ConfigError
from petals_eval.metrics import KINDS, MetricSpec, check_metric_names
from petals_eval.runs.results import AdapterResult, RunResult
from petals_eval.text import number_text

__all__ = ["Threshold", "check_parts", "missed", "parse_thresholds"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a metric must reach, or must not exceed.

    name: of a metric, or of one label's part of it, such as "recall[human]".
    bound: the least that it must be; with `is_upper` the most that it may be.
    """

    name: str
    bound: float
    is_upper: bool = False

    @classmethod
    def parse(
        cls, text: str, label_names: Sequence[str], kind: str = "classification", *, is_upper: bool = False
    ) -> "Threshold":
        """Read "accuracy=0.7", or with `is_upper` "log_loss=0.5".

        Raises ConfigError for a metric that this kind of task does not have, that has no single number or is better
        the other way, and for a number that none can reach.

        >>> Threshold.parse("f1_macro=0.5", ("no", "yes"))
        Threshold(name='f1_macro', bound=0.5, is_upper=False)
        """
        flag = "fail_over" if is_upper else "fail_under"
        name, equals, number = text.rpartition("=")
        try:
            found = cls(name.strip(), float(number), is_upper)
        except ValueError:
            found = cls("", 0.0)
        if not equals or not found.name or found.bound != found.bound:
            example = "log_loss=0.5" if is_upper else "accuracy=0.7"
            raise ConfigError(f"{flag}: expected METRIC=NUMBER such as {example}; found {text!r}")
        spec = found._spec(kind)
        names = spec.names(label_names)
        is_part = found.metric == spec.name and not spec.score and not label_names  # of a metric with parts of its own
        if spec.name == "confusion_matrix" or (found.name not in names and not is_part):
            raise ConfigError(f"{flag}: {found.name} is not a single number. Expected one such as {', '.join(names)}.")
        if spec.higher_is_better == is_upper:
            better, right_flag = ("higher", "--fail-under") if is_upper else ("lower", "--fail-over")
            raise ConfigError(
                f"{flag}: {found.name} is better when it is {better}. Give {right_flag} {found.name}={number.strip()}."
            )
        if not is_upper and spec.best is not None and found.bound > spec.best:
            raise ConfigError(
                f"{flag}: expected at most {spec.best:g}, the best {found.name} there is; found {found.bound:g}."
            )
        return found

    @property
    def metric(self) -> str:
        """What a task has to list for it: "recall_per_class" for "recall[human]"."""
        base, bracket, _ = self.name.partition("[")
        scores = {spec.score for specs in KINDS.values() for spec in specs}
        return f"{base}_per_class" if bracket and base in scores else base

    def is_kept_by(self, value: float | None) -> bool:
        """Return whether a value is good enough; one that is not defined is not."""
        if value is None:
            return False
        return value <= self.bound if self.is_upper else value >= self.bound

    def _spec(self, kind: str) -> MetricSpec:
        # Of what is no name at all the whole is shown, with the names that come close.
        known = {spec.name: spec for spec in KINDS[kind]} if kind in KINDS else {}
        return known[self.metric if self.metric in known else check_metric_names([self.name], kind)[0]]


def parse_thresholds(
    fail_under: Sequence[str], fail_over: Sequence[str], label_names: Sequence[str], *, kind: str = "classification"
) -> tuple[Threshold, ...]:
    """Return the thresholds of a run. Raises as `Threshold.parse`."""
    return (
        *(Threshold.parse(text, label_names, kind=kind) for text in fail_under),
        *(Threshold.parse(text, label_names, kind=kind, is_upper=True) for text in fail_over),
    )


def check_parts(thresholds: Sequence[Threshold], columns: Sequence[str]) -> None:
    """Raise ConfigError for a threshold of a metric that is computed in parts, such as exact_match[strict] of an answer
    taken out of a text, where it names none of them.

    columns: of the task, which has one for each part.
    """
    for threshold in thresholds:
        parts = [column for column in columns if column.startswith(f"{threshold.metric}[")]
        names_a_part = threshold.name.startswith(f"{threshold.metric}[")
        if (parts or names_a_part) and threshold.name not in parts:
            flag = "fail_over" if threshold.is_upper else "fail_under"
            known = ", ".join(parts or [threshold.metric])
            raise ConfigError(f"{flag}: this task has no number of the name {threshold.name}. Expected one of {known}.")


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
            if not threshold.is_kept_by(value):
                found = "has no value" if value is None else f"is {number_text(value)}"
                where, asks = ("above", "over allows") if threshold.is_upper else ("below", "under asks for")
                lines.append(
                    f"{where} the bar{_whose(adapter, adapters)}: {threshold.name} {found}, --fail-{asks} "
                    f"{threshold.bound:g}"
                )
    return lines


def _whose(result: AdapterResult, among: Sequence[AdapterResult]) -> str:
    return f" ({result.adapter})" if len(among) > 1 else ""

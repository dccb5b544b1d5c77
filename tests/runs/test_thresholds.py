"""Bars: what is below them, and which cannot be set."""

import pytest

from petals_eval.errors import ConfigError
from petals_eval.metrics import Metric, MetricSpec
from petals_eval.runs import AdapterResult, RunResult
from petals_eval.runs.thresholds import Threshold, check_parts, missed, parse_thresholds

LABELS = ("no", "yes")


def reached(name: str, failed: int = 0, **metrics: float | None) -> AdapterResult:
    found = {key.replace("__", "["): Metric(key, value, None) for key, value in metrics.items()}
    return AdapterResult(name, 100, failed, 0, 0, 1.0, found, LABELS, ((1, 0), (0, 1)))


def result(*adapters: AdapterResult, bare: AdapterResult | None = None) -> RunResult:
    return RunResult("t", {each.adapter: each for each in adapters}, bare)


def test_what_reaches_a_bar_is_not_below_it() -> None:
    bars = [Threshold("accuracy", 0.7), Threshold("f1_macro", 0.5)]
    assert missed(result(reached("a", 2, accuracy=0.7, f1_macro=0.5)), bars, 2) == []
    assert missed(result(reached("a", accuracy=0.0)), [], 0) == []


def test_each_bar_that_is_missed_is_a_line() -> None:
    bars = [Threshold("accuracy", 0.7), Threshold("f1_macro", 0.5)]
    assert missed(result(reached("a", 3, accuracy=0.6999, f1_macro=None)), bars, 2) == [
        "below the bar: 3 of 100 examples failed, --max-failed allows 2; failures.jsonl says why",
        "below the bar: accuracy is 0.6999, --fail-under asks for 0.7",
        "below the bar: f1_macro has no value, --fail-under asks for 0.5",
    ]


def test_of_several_adapters_each_must_reach_it_and_the_bare_head_only_must_not_fail() -> None:
    found = result(reached("a", accuracy=0.9), reached("b", accuracy=0.6), bare=reached("bare", 1, accuracy=0.1))
    assert missed(found, [Threshold("accuracy", 0.7)], 0) == [
        "below the bar (bare): 1 of 100 examples failed, --max-failed allows 0; failures.jsonl says why",
        "below the bar (b): accuracy is 0.6000, --fail-under asks for 0.7",
    ]


def test_a_bar_for_one_label() -> None:
    bar = Threshold.parse("recall[yes]=.25", LABELS)
    assert (bar.name, bar.bound, bar.metric) == ("recall[yes]", 0.25, "recall_per_class")


def test_what_is_better_when_lower_has_a_bar_from_above() -> None:
    bars = parse_thresholds(["accuracy=0.5"], ["log_loss=0.5", "ece=1e4"], LABELS)
    assert [(bar.name, bar.bound, bar.is_upper) for bar in bars] == [
        ("accuracy", 0.5, False),
        ("log_loss", 0.5, True),
        ("ece", 10000.0, True),
    ]
    assert missed(result(reached("a", accuracy=0.5, log_loss=0.5, ece=0.1)), bars, 0) == []
    assert missed(result(reached("a", accuracy=0.4, log_loss=12345.678, ece=None)), bars, 0) == [
        "below the bar: accuracy is 0.4000, --fail-under asks for 0.5",
        "above the bar: log_loss is 12,345.7, --fail-over allows 0.5",
        "above the bar: ece has no value, --fail-over allows 10000",
    ]
    with pytest.raises(
        ConfigError, match=r"fail_over: accuracy is better when it is higher\. Give --fail-under accuracy=1"
    ):
        parse_thresholds([], ["accuracy=1"], LABELS)
    with pytest.raises(ConfigError, match=r"fail_over: expected METRIC=NUMBER such as log_loss=0\.5; found 'ece'"):
        parse_thresholds([], ["ece"], LABELS)


def test_a_bar_is_for_a_metric_of_the_kind_of_task(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = MetricSpec("shared", "shared", "", lambda given: [], higher_is_better=False, best=None)
    parts = MetricSpec("match", "match", "of each extraction, as match[name]", lambda given: [])
    unbounded = MetricSpec("length", "length", "", lambda given: [], best=None)
    monkeypatch.setattr("petals_eval.runs.thresholds.KINDS", {"texts": (shared, parts, unbounded)})
    monkeypatch.setattr("petals_eval.metrics.registry.KINDS", {"texts": (shared, parts, unbounded)})
    assert Threshold.parse("length=1e6", (), kind="texts").bound == 1e6
    assert Threshold.parse("match[strict]=0.5", (), kind="texts").metric == "match"
    assert Threshold.parse("shared=20", (), kind="texts", is_upper=True).is_upper
    with pytest.raises(
        ConfigError, match=r"the name of a metric of texts; found 'accuracy'\. There are: shared, match"
    ):
        Threshold.parse("accuracy=0.5", (), kind="texts")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "expected METRIC=NUMBER such as accuracy=0.7; found 'accuracy'"),
        ("=0.7", "expected METRIC=NUMBER"),
        ("accuracy=much", "expected METRIC=NUMBER"),
        ("accuracy=nan", "expected METRIC=NUMBER"),
        ("acuracy=0.7", "found 'acuracy'. Did you mean accuracy"),
        ("f1_per_class=0.7", r"not a single number. Expected one such as f1\[no\], f1\[yes\]"),
        ("f1[maybe]=0.7", r"Expected one such as f1\[no\]"),
        ("confusion_matrix=0.7", "not a single number"),
        ("log_loss=0.7", r"better when it is lower\. Give --fail-over log_loss=0\.7\."),
        ("accuracy[yes]=0.7", "not a single number. Expected one such as accuracy"),
        ("accuracy=70", "expected at most 1, the best accuracy there is; found 70"),
    ],
)
def test_bars_that_cannot_be_set(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Threshold.parse(text, LABELS)


def test_a_bar_is_one_of_the_kind_of_task() -> None:
    assert Threshold.parse("pearson=0.5", (), kind="regression") == Threshold("pearson", 0.5)
    for text, message in (
        ("accuracy=0.5", "a metric of regression; found 'accuracy'"),
        ("mse=1", "better when it is lo"),
    ):
        with pytest.raises(ConfigError, match=message):
            Threshold.parse(text, (), kind="regression")


def test_a_bar_for_a_metric_that_is_computed_in_parts_names_one_of_them() -> None:
    columns = ("new_tokens", "stopped_by_length", "exact_match[strict]", "exact_match[flexible]")
    check_parts([Threshold("exact_match[strict]", 0.5), Threshold("recall[yes]", 0.5)], columns)
    check_parts([Threshold("exact_match", 0.5)], ("new_tokens", "stopped_by_length", "exact_match"))
    with pytest.raises(
        ConfigError, match=r"name exact_match\. Expected one of exact_match\[strict\], exact_match\[flex"
    ):
        check_parts([Threshold("exact_match", 0.5)], columns)
    with pytest.raises(
        ConfigError, match=r"fail_under: this task has no number of the name exact_match\[lax\]\. Expected"
    ):
        check_parts([Threshold("exact_match[lax]", 0.5)], ("exact_match",))

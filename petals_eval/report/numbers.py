"""Numbers as reports write them."""

from collections.abc import Iterable, Sequence

from petals_eval.metrics import Metric
from petals_eval.runs import AdapterResult, ComputedIn, RunResult, WireRecord
from petals_eval.runs.tables import metric_title
from petals_eval.text import number_text, plural, printable

__all__ = [
    "counts_line",
    "counts_of",
    "interval_text",
    "interval_title",
    "metric_names",
    "metric_title",
    "noise_line",
    "notes",
    "rate_text",
    "swarm_line",
    "value_text",
    "wire_lines",
]


ROUGH = "~ marks an interval that may cover less than 95%: it rests on few rows, or on few errors"
ROUGH_OF_CLUSTERS = "~ marks an interval that may cover less than 95%: it rests on few rows, errors or clusters"


def value_text(metric: Metric | None) -> str:
    """Return a value with four decimals, or six digits of a large one; "-" where there is none."""
    return "-" if metric is None or metric.value is None else number_text(metric.value)


def interval_text(metric: Metric | None) -> str:
    """Return an interval with three decimals, or five digits of a large value's, or the spread over draws; an empty
    text where there is none. "~" stands before one that may cover less than 95%."""
    if metric is None:
        return ""
    if metric.draws is not None:
        values, deviation = metric.draws.values, metric.draws.standard_deviation
        spread = [number_text(each, 3, beside=metric.value) for each in (min(values), max(values), deviation)]
        return f"{spread[0]} - {spread[1]}, sd {spread[2]}"
    if metric.ci95 is None:
        return ""
    bounds = " - ".join(number_text(bound, 3, beside=metric.value) for bound in metric.ci95)
    return f"~{bounds}" if metric.is_rough else bounds


def interval_title(results: Iterable[AdapterResult]) -> str:
    """Return what stands above the texts of `interval_text`."""
    draws = max((len(result.draws) for result in results), default=0)
    return f"over {draws} draws" if draws else "95% interval"


def metric_names(results: Iterable[AdapterResult]) -> list[str]:
    """Return every name that occurs, in order."""
    return list(dict.fromkeys(name for result in results for name in result.metrics))


def notes(results: Sequence[AdapterResult]) -> list[str]:
    """Return what a reader must know about single numbers, a line each."""
    found = []
    for name in metric_names(results):
        by_note: dict[str, list[str]] = {}
        for result in results:
            metric = result.metrics.get(name)
            if metric is not None and metric.note is not None:
                by_note.setdefault(metric.note, []).append(result.adapter)
        for note, adapters in by_note.items():
            whose = "" if len(adapters) == len(results) else f" ({', '.join(adapters)})"
            found.append(printable(f"{metric_title(name)}{whose}: {note}"))
    clusters = max((result.n_clusters or 0 for result in results), default=0)
    if clusters:
        found.append(f"intervals are cluster-robust: rows depend on each other within {plural(clusters, 'cluster')}")
    if any(metric.is_rough for result in results for metric in result.metrics.values()):
        found.append(ROUGH_OF_CLUSTERS if clusters else ROUGH)
    return found


def counts_of(result: AdapterResult) -> dict[str, str]:
    """Return examples, failures, examples without a label, cut texts and speed. What is 0 is left out, but failures are
    always said."""
    found = {"examples": f"{result.n_examples:,}", "failed": f"{result.n_failed:,}"}
    if result.n_unlabelled:
        found["without a label"] = f"{result.n_unlabelled:,}"
    if result.n_truncated:
        found["truncated"] = f"{result.n_truncated:,}"
    if result.examples_per_second is not None and result.tokens_per_second is not None:
        found |= {"ex/s": rate_text(result.examples_per_second), "tok/s": rate_text(result.tokens_per_second)}
    return found


def counts_line(result: AdapterResult) -> str:
    """Return what `counts_of` counts in one line."""
    return " · ".join(f"{count} {what}" for what, count in counts_of(result).items())


def rate_text(rate: float) -> str:
    """
    >>> rate_text(2175.3), rate_text(9.87), rate_text(0.0312)
    ('2,175', '9.9', '0.031')
    """
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def swarm_line(result: RunResult) -> str:
    """Return retries, servers, and what these computed in, which changes numbers."""
    line = f"{plural(result.retries, 'retry', 'retries')} · {plural(result.servers, 'server')}"
    kinds = [_kind(each, alone=len(result.computed_in) == 1) for each in result.computed_in]
    return f"{line} ({'; '.join(kinds)})" if kinds else line


def noise_line(result: RunResult) -> str | None:
    """Return a line where servers that were used gave unequal answers: another run would give other numbers."""
    disputed = [each for each in result.noisy_servers if each.verdict == "disputed"]
    used = [each for each in result.noisy_servers if each.is_used and each.verdict == "noisy"]
    if disputed:
        largest = max(each.difference for each in disputed)
        return (
            f"in doubt: {plural(len(disputed), 'server')} that took part do not agree (difference up to {largest:.2g}) "
            "and nobody could say who is right; the examples are marked in the predictions"
        )
    if not used:
        return None
    largest = max(each.difference for each in used)
    return (
        f"not reproducible: {plural(len(used), 'server')} in training mode took part "
        f"(difference of two answers to one question: up to {largest:.2g})"
    )


def wire_lines(wire: WireRecord | None) -> list[str]:
    """Return what a lossy wire did to the answers, and who did not take it."""
    if wire is None:
        return []
    lines = [f"wire {wire.name}: {_sample_text(wire)}"]
    by_reason: dict[str, int] = {}
    for server in wire.lossless:
        by_reason[server.reason] = by_reason.get(server.reason, 0) + 1
    for reason, count in by_reason.items():
        lines.append(f"lossless to and from {plural(count, 'server')}, which did not take it: {reason}")
    return [printable(line) for line in lines]


def _sample_text(wire: WireRecord) -> str:
    sample = wire.sample
    if sample is None or sample.largest is None or sample.mean is None:
        note = None if sample is None else sample.note
        return f"how far it moved answers was {note or 'not measured'}"
    changed = "" if sample.changed is None else f"; {plural(sample.changed, 'prediction')} changed"
    return (
        f"moved the answers to {plural(sample.examples, 'example')} by up to {sample.largest:.2g}, "
        f"{sample.mean:.2g} on average{changed}"
    )


def _kind(kind: ComputedIn, *, alone: bool) -> str:
    count = "" if alone else f"{kind.servers} x "
    quant = "" if kind.quant in (None, "none") else f" quantised to {kind.quant}"
    version = kind.version or "of unknown version"
    untested = "" if kind.is_tested else ", not tested: relied on for the forward path alone"
    return printable(f"{count}{kind.dtype or 'unknown dtype'}{quant}, petals {version}{untested}")

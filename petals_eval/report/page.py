"""A run as one HTML page: what came out, how sure it is, where it goes wrong, who computed it, how to repeat it."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from petals_eval.data.rows import name_of
from petals_eval.metrics import Metric, ScoredRows, measure
from petals_eval.metrics.answers import Answers
from petals_eval.metrics.calibration import Bins, confidence_bins
from petals_eval.report import charts
from petals_eval.report.numbers import (
    metric_names,
    metric_title,
    noise_line,
    notes,
)
from petals_eval.report.templating import Plot, template
from petals_eval.runs import AdapterResult, Manifest, RunFolder, RunResult, ServerUsed
from petals_eval.tasks import list_tasks
from petals_eval.text import plural, printable

__all__ = ["page"]

MOST_DRAWN = 6  # adapters with plots of their own: a page of more is not read
MOST_LABELS = 30  # of a confusion matrix
MOST_SERVERS = 200
LENGTHS = 6  # groups of rows by their length


@dataclass(frozen=True)
class _Adapter:
    """One adapter's part of the page. about: what its plots are of, where that is not plain."""

    result: AdapterResult
    plots: tuple[Plot, ...]
    about: str = ""


def page(folder: RunFolder) -> str:
    """Return the page of a run that is finished, interrupted or under way.

    folder: open. Raises RunFolderError as `RunFolder.result` does, MachineError.
    """
    result, manifest = folder.result(), folder.manifest
    adapters = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
    servers = folder.journal.servers()
    rendered: str = template("run.html").render(
        result=result,
        manifest=manifest,
        state=_state(result, manifest),
        adapters=adapters,
        names=metric_names(adapters),
        notes=notes(adapters),
        estimate=_estimate(adapters),
        details=[_details(folder, each) for each in adapters[:MOST_DRAWN]],
        not_drawn=len(adapters) - MOST_DRAWN,
        servers=servers[:MOST_SERVERS],
        more_servers=len(servers) - MOST_SERVERS,
        num_blocks=max((server.end for server, _ in servers), default=0),
        doubts=_doubts(result),
        origin=list(_origin(manifest)),
        command=command_of(manifest),
        heat=_heat,
        most_labels=MOST_LABELS,
    )
    return rendered


def _state(result: RunResult, manifest: Manifest) -> tuple[str, str]:
    """Return a class and a sentence on whether the numbers can be relied on."""
    every = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
    scored, failed = (sum(getattr(each, name) for each in every) for name in ("n_scored", "n_failed"))
    doubt = noise_line(result)
    if manifest.finished is None:
        wanted = "" if manifest.data.rows is None else f" of {manifest.data.rows * len(every):,}"
        return "bad", f"Not finished: {scored:,}{wanted} examples are scored. The numbers are of these alone."
    if doubt is not None:
        return "bad", f"{doubt[:1].upper()}{doubt[1:]}."
    if failed:
        return "warn", f"{plural(failed, 'example')} failed: the numbers are of the others alone."
    return "good", f"Finished {manifest.finished.replace('T', ' ').replace('+00:00', ' UTC')}: every example is scored."


def _estimate(adapters: Sequence[AdapterResult]) -> Plot | None:
    """Return the first metric of all adapters, with what always answering the commonest label would reach."""
    name = next((name for name in metric_names(adapters) if _drawable(adapters[0].metrics.get(name))), None)
    if name is None:
        return None
    found = [(each.adapter, metric) for each in adapters if _drawable(metric := each.metrics.get(name))]
    baseline = adapters[0].metrics.get("majority_baseline") if name == "accuracy" else None
    line = None if baseline is None else baseline.value
    svg = charts.points(
        [(adapter, metric.value, metric.ci95) for adapter, metric in found if metric and metric.value is not None],
        metric_title(name),
        title=f"{metric_title(name)} of each adapter",
        line=line,
        line_name="majority baseline",
    )
    return Plot(metric_title(name), svg, "The bars are 95% intervals.")


def _drawable(metric: Metric | None) -> bool:
    return metric is not None and metric.value is not None and math.isfinite(metric.value)


def _details(folder: RunFolder, result: AdapterResult) -> _Adapter:
    manifest = folder.manifest
    name = result.in_journal[0].adapter
    rows = folder.journal.scored_rows(name, manifest.answer_columns)
    if len(rows) == 0:
        return _Adapter(result, ())
    lengths = folder.journal.lengths(name)
    plots = list(_plots(manifest.kind, rows, lengths, result, folder.names_of("metrics")))
    about = f"The plots show the first of {len(result.draws)} draws." if len(result.draws) > 1 else ""
    return _Adapter(result, tuple(plots), about)


def _plots(
    kind: str, rows: ScoredRows, lengths: np.ndarray, result: AdapterResult, metrics: Sequence[str]
) -> Iterator[Plot]:
    """metrics: that the run was asked for: one may give several numbers, such as "f1_per_class"."""
    labels = result.label_names
    answers = Answers.of(rows, labels) if labels and rows.is_labelled.any() else None
    if answers is not None:
        yield _reliability(confidence_bins(answers.labels, answers.predictions, answers.probabilities))
        yield _by_label(kind, rows, labels)
    found = next((plots for name in metrics if (plots := list(_by_length(kind, name, rows, lengths, labels)))), [])
    yield from found
    if kind == "perplexity":
        yield from _by_position(rows)
    yield from _histograms(kind, rows, answers)


def _reliability(bins: Bins) -> Plot:
    svg = charts.reliability(bins.confidence, bins.accuracy, bins.counts, title="reliability diagram")
    about = "On the dashed line a confidence of 0.8 is right in 80 of 100 rows; below it the model is too sure."
    return Plot("Calibration", svg, f"{about} The grey columns are how many rows have which confidence.")


def _by_label(kind: str, rows: ScoredRows, labels: Sequence[str]) -> Plot:
    groups = {name: np.flatnonzero(rows.labels == number) for number, name in enumerate(labels)}
    shown = sorted(((name, each) for name, each in groups.items() if len(each)), key=lambda pair: -len(pair[1]))
    _, found = _measured(kind, "accuracy", rows, shown[: charts.MOST_POINTS], labels)
    more = f" The {charts.MOST_POINTS} commonest of {len(shown)}." if len(shown) > charts.MOST_POINTS else ""
    svg = charts.points(found, "share that is right", title="share that is right, by label")
    return Plot("By label", svg, f"Of the rows of each label, how many are right, with 95% intervals.{more}")


def _by_length(kind: str, metric: str, rows: ScoredRows, lengths: np.ndarray, labels: Sequence[str]) -> Iterator[Plot]:
    """Yield the metric over rows of like length, where lengths differ."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTHS + 1)).round())
    if len(edges) < 3:
        return
    group = np.clip(np.searchsorted(edges, lengths, side="left") - 1, 0, len(edges) - 2)
    chosen = [np.flatnonzero(group == number) for number in range(len(edges) - 1)]
    named = [(_range(lengths[each]), each) for each in chosen if len(each)]
    name, found = _measured(kind, metric, rows, named, labels)
    if len(found) > 1:
        title = metric_title(name)
        svg = charts.points(found, title, title=f"{title} by text length")
        yield Plot("By length", svg, "Groups of about as many rows each, by tokens of their text.")


def _range(lengths: np.ndarray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"


def _measured(
    kind: str, metric: str, rows: ScoredRows, groups: Sequence[tuple[str, np.ndarray]], labels: Sequence[str]
) -> tuple[str, list[charts.Point]]:
    """Return the first number that a metric gives over some of the rows at a time, and its name: the same formula, and
    the same kind of interval."""
    by_group = [measure(kind, [metric], rows.at(positions), label_names=labels) for _, positions in groups]
    name = next((name for found in by_group for name, value in found.items() if _drawable(value)), metric)
    points = [
        (group, value.value, value.ci95)
        for (group, _), found in zip(groups, by_group, strict=True)
        if (value := found.get(name)) is not None and value.value is not None and math.isfinite(value.value)
    ]
    return name, points


def _by_position(rows: ScoredRows) -> Iterator[Plot]:
    """Yield the perplexity of the first windows of all documents, of the second ones, and so on."""
    if len(rows.items) == 0 or rows.items.max() < 2:
        return
    position = np.arange(len(rows.values)) - np.repeat(rows.starts[:-1], rows.items)
    tokens = np.bincount(position, rows.column("tokens"))
    likelihood = np.bincount(position, rows.column("log_likelihood"))
    svg = charts.curve(
        np.arange(1, len(tokens) + 1),
        np.exp(-likelihood / np.maximum(tokens, 1)),
        "window of the document",
        "token perplexity",
        title="token perplexity by position in the document",
    )
    yield Plot("By position", svg, "Over the first windows of all documents, the second ones, and so on.")


def _histograms(kind: str, rows: ScoredRows, answers: Answers | None) -> Iterator[Plot]:
    starts = rows.starts[:-1]
    if answers is not None:
        two = np.sort(answers.probabilities, axis=1)[:, -2:]
        about = "Between the two best answers. Near 0 a little noise turns the prediction."
        yield _histogram("Margin", two[:, 1] - two[:, 0], "difference of probability", about)
    if kind == "choice":
        scores = rows.column("log_likelihood")
        best = np.maximum.reduceat(scores, starts)
        yield _histogram("Likelihood", best, "log-likelihood, nats", "Of the likeliest choice of each row.")
        if answers is None and (rows.items >= 2).all():
            margins = [_margin(scores[first:last]) for first, last in zip(starts, rows.starts[1:], strict=True)]
            about = "Between the two likeliest choices. Near 0 a little noise turns the prediction."
            yield _histogram("Margin", np.asarray(margins), "difference of log-likelihood, nats", about)
    elif kind in ("continuation", "perplexity"):
        tokens = np.maximum(np.add.reduceat(rows.column("tokens"), starts), 1)
        values = np.add.reduceat(rows.column("log_likelihood"), starts) / tokens
        what = "document" if kind == "perplexity" else "target"
        yield _histogram("Likelihood", values, "log-likelihood a token, nats", f"Of each {what}.")
    elif kind == "regression":
        known = rows.labelled()
        yield _histogram("Errors", known.predictions - known.labels, "prediction - label", "Of each row.")
    elif kind == "generation" and "new_tokens" in rows.columns:
        yield _histogram("Length of texts", rows.column("new_tokens"), "new tokens", "Of each text.")


def _margin(scores: np.ndarray) -> float:
    second, best = np.partition(scores, -2)[-2:]
    return float(best - second)


def _histogram(title: str, values: np.ndarray, label: str, about: str) -> Plot:
    return Plot(title, charts.histogram(values, label, title=f"histogram: {title.lower()}"), about)


def _doubts(result: RunResult) -> list[tuple[str, ServerUsed, str]]:
    """Return what is known against servers: identity, blocks, and what they did."""
    said = {
        "noisy": "two answers to one question: its blocks run in training mode",
        "liar": "answers that are wrong: left out, nothing it computed is counted",
        "disputed": "answers unlike those of others, and nobody could say who is right",
    }
    found = []
    for each in result.noisy_servers:
        used = "" if each.verdict != "noisy" else "; used all the same" if each.is_used else "; left out"
        text = f"{said[each.verdict]}{used} (difference up to {each.difference:.2g})"
        found.append((each.peer_id, ServerUsed(each.peer_id, each.first, each.end), text))
    return found


def _origin(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model, data = manifest.model, manifest.data
    yield "started", manifest.created
    yield "model", f"{model.name}{f' at {model.revision}' if model.revision else ''}, sha256 {model.sha256[:16]}…"
    for each in manifest.adapters:
        yield "adapter", f"{each.name} ({each.kind})" + (f", sha256 {each.sha256[:16]}…" if each.sha256 else "")
    sample = "all examples" if data.limit is None else f"{data.limit:,} examples, seed {data.seed}"
    yield "data", f"{data.name}, {sample}, fingerprint {data.fingerprint[:16]}…"
    for key, value in manifest.answer_settings.items():
        if value is not None:
            text = str(value)
            yield key, f"sha256 {text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text
    share = manifest.run_settings.get("verify")
    if isinstance(share, int | float):
        yield "verification", f"{share:.2%} of each server's work computed elsewhere, too, where others hold its blocks"
    yield "packages", ", ".join(f"{name} {version}" for name, version in manifest.packages.items())


_FLAGS = (
    *("pool", "dtype", "wire", "active_adapter", "require_dtype", "require_quant", "verify", "push", "window"),
    *("lanes", "cache_share"),
)
_DEFAULTS = {"pool": "auto", "verify": 0.02, "push": "auto", "cache_share": 0.25}


def command_of(manifest: Manifest) -> str:
    """Return the command that repeats a run. Names stand for paths, which a run does not keep, and a placeholder in
    <> for what it does not know."""
    words = ["petals-eval", "run", "--model", manifest.model.name]
    if manifest.model.revision:
        words += ["--revision", manifest.model.revision]
    for name in dict.fromkeys(each.adapter or each.name for each in manifest.adapters if each.kind != "none"):
        words += ["--adapter", name]
    if len(manifest.adapters) > 1 and any(each.kind == "none" for each in manifest.adapters):
        words.append("--without-prompts")
    words += _task_and_data(manifest)
    if manifest.data.limit is not None:
        words += ["--limit", str(manifest.data.limit)]
    if manifest.data.seed:
        words += ["--seed", str(manifest.data.seed)]
    draws = max((each.draw or 1 for each in manifest.adapters), default=1)
    if draws > 1:
        words += ["--draws", str(draws)]
    settings = {**manifest.run_settings, **manifest.answer_settings}
    for name in _FLAGS:
        value = settings.get(name)
        if value is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    prefix = settings.get("dht_prefix")
    words += ["--dht-prefix", str(prefix)] if prefix else []
    if settings.get("local_swarm"):
        words += ["--local-swarm", str(settings["local_swarm"])]
    elif settings.get("public_swarm"):
        words.append("--public-swarm")
    else:
        words += ["--initial-peers", "<address of a peer>"]
    return shlex.join(map(printable, words))


def _task_and_data(manifest: Manifest) -> list[str]:
    """Return the flags that say what was evaluated: a task that ships by its name, any other as a file's."""
    name, data = str(manifest.task.get("name", "task")), manifest.data.name
    shipped = next((task for task in list_tasks() if task.name == name), None)
    if shipped is None:
        words = ["--task", f"<your task file {name}.yaml>"]
    elif shipped.data is not None and name_of(shipped.data) == data:
        return ["--task", name]
    else:
        words = ["--task", name]
    # A blank stands between a data set of the hub, its subset and its split, and in what came from memory.
    return [*words, "--data", f"<your data {data}>" if " " in data else data]


def _heat(matrix: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Return of each cell its count, and how much of its row it is in percent."""
    return [[(count, round(100 * count / max(1, sum(row)))) for count in row] for row in matrix]

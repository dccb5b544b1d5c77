"""The report as Markdown: the numbers, and how they came about."""

import re
from collections.abc import Iterable, Sequence

from petals_eval.comparison.tables import DETECTABLE, signed_interval_text, signed_text
from petals_eval.metrics.differences import Difference
from petals_eval.metrics.noise import FACTOR
from petals_eval.report.noise import noise_lines, noise_range_text
from petals_eval.report.numbers import (
    counts_line,
    interval_text,
    metric_names,
    metric_title,
    notes,
    swarm_line,
    value_text,
    wire_lines,
)
from petals_eval.runs import AdapterResult, Manifest, NoisyServer, RunResult, ServerUsed, WireRecord
from petals_eval.text import number_text, p_value_text, printable

__all__ = ["markdown_report"]

MAX_LABELS = 20  # a wider confusion matrix cannot be read in Markdown; it is in metrics.json


def markdown_report(result: RunResult, manifest: Manifest, servers: Sequence[tuple[ServerUsed, int]] = ()) -> str:
    """Return the whole report. servers: each with the number of examples it took part in (`Journal.servers`)."""
    adapters = [*result.adapters.values(), *([result.without_prompts] if result.without_prompts else [])]
    sections = [
        f"# {_safe(result.task)} with {_safe(manifest.model.name)}",
        _metrics(adapters),
        _differences(result.differences),
        *(_draws(each) for each in adapters if each.draws),
        "\n".join(f"- {_safe(note)}" for note in notes(adapters)),
        "\n".join([*(f"- {_safe(each.adapter)}: {counts_line(each)}" for each in adapters), f"- {swarm_line(result)}"]),
        *(_confusion(each) for each in adapters if each.label_names),
        _origin(manifest),
        _servers(servers),
        _wire(result.wire),
        _noise(adapters),
        _noisy(result.noisy_servers),
        _wrong(result.noisy_servers),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metrics(adapters: Sequence[AdapterResult]) -> str:
    rows = [[metric_title(name), *(_cell(each, name) for each in adapters)] for name in metric_names(adapters)]
    intervals = (
        "95% intervals in brackets: Wilson's for shares of the examples such as accuracy, for the rest one by what "
        "each example adds, corrected for skewness."
    )
    if any(each.draws for each in adapters):
        intervals = (
            "Means over draws of shots; in brackets the least, the greatest, and the standard deviation of a draw."
        )
    return f"{_table(['', *(each.adapter for each in adapters)], rows)}\n\n{intervals}"


def _differences(found: Sequence[Difference]) -> str:
    """Return a section on how much the first adapter differs from the others, or nothing."""
    if not found:
        return ""
    heads = ["", "metric", "difference", "95% interval", "p", "p (Holm)", "detectable"]
    rows = [
        [
            f"{each.first} - {each.second}",
            metric_title(each.metric),
            signed_text(each),
            signed_interval_text(each),
            p_value_text(each.p_value),
            p_value_text(each.p_holm),
            "-" if each.minimum_detectable is None else number_text(each.minimum_detectable, 3),
        ]
        for each in found
    ]
    methods = "; ".join(dict.fromkeys(each.method for each in found))
    about = (
        f"On the {found[0].rows:,} rows that all of them scored. Shares, then the others: {methods}. Holm's correction "
        "is over the pairs of a metric. Detectable is "
        f"{DETECTABLE}."
    )
    return f"## Differences\n\n{_table(heads, rows)}\n\n{about}"


def _draws(result: AdapterResult) -> str:
    rows = [[metric_title(name), *(_cell(each, name) for each in result.draws)] for name in metric_names(result.draws)]
    return (
        f"## Draws of shots: {_safe(result.adapter)}\n\n{_table(['', *(each.adapter for each in result.draws)], rows)}"
    )


def _cell(result: AdapterResult, name: str) -> str:
    metric = result.metrics.get(name)
    interval = interval_text(metric)
    return value_text(metric) + (f" ({interval})" if interval else "")


def _confusion(result: AdapterResult) -> str:
    title = f"## Confusion matrix: {_safe(result.adapter)}"
    if len(result.label_names) > MAX_LABELS:
        return f"{title}\n\n{len(result.label_names)} labels: see `confusion_matrix` in metrics.json."
    rows = [[name, *map(str, row)] for name, row in zip(result.label_names, result.confusion, strict=True)]
    return f"{title}\n\nRows: labels. Columns: predictions.\n\n{_table(['', *result.label_names], rows)}"


def _origin(manifest: Manifest) -> str:
    model, data = manifest.model, manifest.data
    sample = "all examples" if data.limit is None else f"{data.limit:,} examples, seed {data.seed}"
    revision = f" at {model.revision}" if model.revision else ""
    rows = [
        ["started", manifest.created],
        ["model", f"{model.name}{revision}, sha256 {model.sha256[:16]}…"],
        *(["adapter", f"{each.name} ({each.kind}), sha256 {each.sha256[:16]}…"] for each in manifest.adapters),
        ["data", f"{data.name}, {sample}, fingerprint {data.fingerprint[:16]}…"],
        *([f"setting {key}", _setting(value)] for key, value in manifest.answer_settings.items() if value is not None),
        ["packages", ", ".join(f"{name} {version}" for name, version in manifest.packages.items())],
    ]
    return f"## Provenance\n\n{_table(['', ''], rows)}"


def _setting(value: object) -> str:
    text = str(value)
    return f"sha256 {text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _servers(servers: Sequence[tuple[ServerUsed, int]]) -> str:
    if not servers:
        return ""
    rows = [
        [
            each.peer_id,
            f"{each.first}:{each.end}",
            each.version or "not said",
            each.dtype or "not said",
            each.quant or "none said",
            f"{count:,}",
        ]
        for each, count in servers
    ]
    heads = ["server", "blocks", "version", "dtype", "quantisation", "examples"]
    return f"## Servers\n\nDtype and version are the servers' own claims.\n\n{_table(heads, rows)}"


def _noise(results: Sequence[AdapterResult]) -> str:
    """Return a section on what rounding may do to the numbers, or nothing where nobody looked for it."""
    lines = noise_lines(results, is_report=True)
    if not lines:
        return ""
    names = [name for name in metric_names(results) if any(noise_range_text(each, name) for each in results)]
    rows = [[metric_title(name), *(noise_range_text(each, name) or "-" for each in results)] for name in names]
    table = [_table(["", *(each.adapter for each in results)], rows)] if rows else []
    about = (
        "Rows were computed again otherwise, to see how far rounding moves the margin between the two best answers. "
        f"Predictions are counted whose margin is below {FACTOR:g} times the mean change, in the way that moves most: "
        "two to three times as many as are to be expected to change. The ranges are those of the metrics if these went "
        "to their runner-up."
    )
    said = "\n".join(f"- {_safe(line)}" for line in lines)
    return "\n\n".join(["## Numerical noise", about, said, *table])


def _wire(wire: WireRecord | None) -> str:
    if wire is None:
        return ""
    title = f"## Lossy wire: {_safe(wire.name)}"
    said = "\n".join(f"- {_safe(line)}" for line in wire_lines(wire))
    rows = [[peer, "took it"] for peer in wire.taken_by] + [[each.peer_id, each.reason] for each in wire.lossless]
    return "\n\n".join([title, said, *([_table(["server", ""], rows)] if rows else [])])


def _wrong(servers: Sequence[NoisyServer]) -> str:
    """Return a section on the servers whose answers differ from those of others, or nothing."""
    wrong = [each for each in servers if each.verdict != "noisy"]
    if not wrong:
        return ""
    disputed = any(each.verdict == "disputed" for each in wrong)
    rows = [
        [
            each.peer_id,
            f"{each.first}:{each.end}",
            each.version or "not said",
            f"{each.difference:.2g}",
            "they do not agree, and nobody could say who is right"
            if each.verdict == "disputed"
            else "wrong, left out: nothing it computed is counted",
        ]
        for each in wrong
    ]
    what_to_do = (
        " Examples that servers in dispute took part in are marked as disputed in the predictions. Another server of "
        "their blocks would settle it, or these blocks at home (--verify-local)."
        if disputed
        else ""
    )
    heads = ["server", "blocks", "version", "difference", ""]
    return (
        "## Servers that answered otherwise than others\n\nA share of what servers compute is computed elsewhere, too. "
        "The difference of two answers is relative to what the blocks did, and larger than rounding explains."
        f"{what_to_do}\n\n{_table(heads, rows)}"
    )


def _noisy(servers: Sequence[NoisyServer]) -> str:
    servers = [each for each in servers if each.verdict == "noisy"]
    if not servers:
        return ""
    rows = [
        [
            each.peer_id,
            f"{each.first}:{each.end}",
            each.version or "not said",
            f"{each.difference:.2g}",
            "used all the same" if each.is_used else "left out: nothing it computed is counted",
        ]
        for each in servers
    ]
    heads = ["server", "blocks", "version", "difference", ""]
    return (
        "## Servers that gave two answers to one question\n\nTheir blocks run in training mode. The difference of the "
        f"two answers is relative to what the blocks did to the question.\n\n{_table(heads, rows)}"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(_safe(cell) if line is not lines[1] else cell for cell in line) + " |" for line in lines
    )


def _safe(text: str) -> str:
    """Text that is nothing but text in Markdown: no markup, no HTML, no end of the table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&])", r"\\\1", printable(text))

"""What is logged of a result: numbers by name, and what the run was."""

import re

from petals_eval.runs import AdapterResult, Manifest, RunResult

__all__ = ["logged_settings", "logged_values"]

_LONGEST = 60  # characters of a part of a name: MLflow takes 250 in all


def logged_values(result: RunResult) -> dict[str, float]:
    """Return every number of a result under a name that all trackers take, such as `sst2/accuracy`.

    A name has the task, with several adapters the adapter, and the metric in it; one label's part of a metric stands
    after another slash, as `trec/f1/human`. The bounds of an interval have `_low` and `_high` at their end, as the
    columns of `petals_eval.load_runs`. What has no value is left out.
    """
    several = len(result.adapters) > 1
    found: dict[str, float] = {}
    for each in result.adapters.values():
        _add(found, [result.task, each.adapter] if several else [result.task], each)
    if result.without_prompts is not None:
        _add(found, [result.task, result.without_prompts.adapter], result.without_prompts)
    return found


def _add(found: dict[str, float], where: list[str], result: AdapterResult) -> None:
    parts: list[tuple[list[str], float | None]] = []
    for name, metric in result.metrics.items():
        base, _, label = name.partition("[")
        path = [*where, base, *([label.removesuffix("]")] if label else [])]
        low, high = metric.ci95 or (None, None)
        bounds = [([*path[:-1], f"{path[-1]}_{end}"], bound) for end, bound in (("low", low), ("high", high))]
        parts += [(path, metric.value), *bounds]
    noise = result.noise
    parts += [
        ([*where, "rows"], result.n_scored),
        ([*where, "failed"], result.n_failed),
        ([*where, "unsure_share"], None if noise is None else noise.share),
        ([*where, "seconds"], result.seconds),
        ([*where, "examples_per_second"], result.examples_per_second),
    ]
    for path, value in parts:
        if value is not None:
            found[_free_name("/".join(map(_part, path)), found)] = float(value)


def _part(text: str) -> str:
    """Return a part of a name with nothing in it that a tracker refuses.

    >>> _part("accuracy"), _part("wo bin ich?"), _part("../x"), _part("")
    ('accuracy', 'wo_bin_ich_', '_x', '_')
    """
    return re.sub(r"[^\w.-]+", "_", text).strip(".")[:_LONGEST] or "_"


def _free_name(name: str, taken: dict[str, float]) -> str:
    """Return the name, or with a number at its end where another one became the same."""
    free, count = name, 2
    while free in taken:
        free, count = f"{name}_{count}", count + 1
    return free


def logged_settings(manifest: Manifest) -> dict[str, str | int | float]:
    """Return what a run was, as a tracker's parameters: names, hashes and seeds, nothing that may not be shared."""
    model, data = manifest.model, manifest.data
    settings = manifest.answer_settings
    said = {
        "model": model.name,
        "model_revision": model.revision,
        "adapters": ", ".join(f"{each.name} ({each.kind}, {each.sha256[:16]})" for each in manifest.adapters),
        "task": str(manifest.task.get("name", "")),
        "data": data.name,
        "data_fingerprint": data.fingerprint[:16],
        "limit": data.limit,
        "seed": data.seed,
        "dtype": settings.get("dtype"),
        "wire": settings.get("wire"),
        "petals_eval": manifest.packages.get("petals_eval"),
    }
    return {key: value for key, value in said.items() if isinstance(value, str | int | float) and value != ""}

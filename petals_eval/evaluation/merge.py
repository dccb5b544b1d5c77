"""Merging the parts of a run: their journals become one, and the numbers are computed from that."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from petals_eval.errors import ConfigError, RunFolderError
from petals_eval.evaluation.evaluate import finish
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import SCHEMA_VERSION, Manifest, WireRecord, difference
from petals_eval.runs.noise import joined_noise
from petals_eval.runs.results import RunResult, run_result
from petals_eval.runs.shard import Shard

__all__ = ["merge"]


def merge(parts: Sequence[str | Path], *, out: str | Path) -> RunResult:
    """Join the run folders of all parts of a run (`evaluate(..., shard="1/3")`, `petals-eval run --shard 1/3`).

    The new folder holds every row of the parts' journals, and is in every way that of a run in one piece; its seconds
    are those of all parts together. A merge that was interrupted is done again by the same call.

    Raises RunFolderError where a part is missing, given twice, not finished, or of another run (with the difference),
    and for an `out` that holds something else; MachineError for the disk.
    """
    if isinstance(parts, str | Path) or not isinstance(parts, Sequence):
        raise ConfigError(f"expected a list of run folders to merge, found {type(parts).__name__}")
    odd = [each for each in (*parts, out) if not isinstance(each, str | Path)]
    if odd:
        raise ConfigError(f"expected paths of run folders, found {type(odd[0]).__name__}")
    if not parts:
        raise ConfigError("expected the run folders of the parts to merge; found none")
    with ExitStack() as stack:
        opened = [stack.enter_context(RunFolder.open(path)) for path in parts]
        whole = _whole(opened)
        _check_rows(opened)
        metrics, label_names = (opened[0].names_of(key) for key in ("metrics", "label_names"))
        task = str(whole.task.get("name", "run"))
        folder = stack.enter_context(RunFolder.create(out, whole, task=task))
        held = sum(_rows(folder).values())
        if held == 0:
            folder.journal.absorb(part.journal for part in opened)
        elif held != sum(sum(_rows(part).values()) for part in opened):
            raise RunFolderError(
                f"Expected {folder.path} to be empty; found an unfinished run in it. Name another folder with --out."
            )
        folder.absorb_texts(opened)
        retries = sum(part.noted_retries() for part in opened)
        result = run_result(
            folder.manifest, folder.journal, task=task, metrics=metrics, label_names=label_names, retries=retries
        )
        finish(folder, result)
    return result


def _whole(parts: Sequence[RunFolder]) -> Manifest:
    """Return the manifest of the run that these are the parts of."""
    first = parts[0]
    shards: dict[int, RunFolder] = {}
    for part in parts:
        shard = part.manifest.data.shard
        if shard is None:
            raise RunFolderError(f"Expected parts made with --shard; found a run in one piece in {part.path}.")
        different = difference(_without_shard(first.manifest), _without_shard(part.manifest))
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            raise RunFolderError(
                f"Expected parts of one run; found that {part.path} is of another one than {first.path}:\n{lines}"
            )
        if shard[0] in shards:
            raise RunFolderError(
                f"Expected each part once; found part {shard[0]}/{shard[1]} in {shards[shard[0]].path} "
                f"and in {part.path}."
            )
        shards[shard[0]] = part
    count = (first.manifest.data.shard or (1, 1))[1]
    missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in shards]
    if missing:
        raise RunFolderError(f"Expected all {count} parts; missing: {', '.join(missing)}. Run them with --shard.")
    settings = first.manifest.run_settings
    same = {k: v for k, v in settings.items() if all(part.manifest.run_settings.get(k) == v for part in parts)}
    whole = _without_shard(first.manifest, keep_count=False)
    return whole.with_noisy(noisy for part in parts for noisy in part.manifest.noisy_servers).model_copy(
        update={
            "created": min(part.manifest.created for part in parts),
            "run_settings": {**same, "merged_parts": count},
            "wire": _wire([part.manifest.wire for part in parts]),
            "noise": joined_noise([part.manifest.noise for part in parts]),
        }
    )


def _wire(records: Sequence[WireRecord | None]) -> WireRecord | None:
    """Join what the parts know of a lossy wire; the sample is the first one's, for all drew the same."""
    known = [record for record in records if record is not None]
    if not known:
        return None
    lossless = {server.peer_id: server for record in known for server in record.lossless}
    taken_by = dict.fromkeys(peer for record in known for peer in record.taken_by)
    return replace(known[0], lossless=tuple(lossless.values()), taken_by=tuple(taken_by))


def _without_shard(manifest: Manifest, *, keep_count: bool = True) -> Manifest:
    """Return a part's manifest as that of the whole run, but for the number of parts, which must be the same."""
    shard = (0, manifest.data.shard[1]) if keep_count and manifest.data.shard else None
    return manifest.model_copy(
        update={
            "data": manifest.data.model_copy(update={"shard": shard}),
            "finished": None,
            "servers": (),
            "schema_version": SCHEMA_VERSION,
        }
    )


def _check_rows(parts: Sequence[RunFolder]) -> None:
    """Raise RunFolderError where an example of a part is not there, or one is in two."""
    for part in parts:
        data = part.manifest.data
        if data.shard is None or data.rows is None:
            raise RunFolderError(f"Expected the number of examples in the manifest of {part.path}; found none.")
        expected = Shard(*data.shard).size(data.rows)
        for name, found in _rows(part).items():
            if found != expected or part.manifest.finished is None:
                raise RunFolderError(
                    f"Expected part {data.shard[0]}/{data.shard[1]} to be finished; found {found} of {expected} "
                    f"examples of {name!r} in {part.path}. Run its command again to go on with it."
                )
    for adapter in parts[0].manifest.adapters:
        seen: dict[str, RunFolder] = {}
        for part in parts:
            for key in part.journal.keys(adapter.name):
                if key in seen:
                    raise RunFolderError(
                        f"Expected each example in one part; found {key!r} in {seen[key].path} and in {part.path}."
                    )
                seen[key] = part


def _rows(part: RunFolder) -> dict[str, int]:
    """Count the examples that are done, by adapter; failures are among them."""
    counts = {adapter.name: part.journal.counts(adapter.name) for adapter in part.manifest.adapters}
    return {name: each.scored + each.failed for name, each in counts.items()}

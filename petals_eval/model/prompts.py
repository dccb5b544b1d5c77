"""Loading a prompt-tuned checkpoint, whichever way it was saved."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.environment import local_path
from petals_eval.errors import AdapterError
from petals_eval.model.adapter import Adapter, AdapterReader
from petals_eval.model.arithmetic import isolated_arithmetic
from petals_eval.model.families import Family
from petals_eval.model.peft_prompts import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    holds_peft_model,
    read_peft,
    read_peft_config,
    read_peft_model,
)
from petals_eval.model.petals_prompts import read_petals
from petals_eval.model.sources import Folder, Source, first_found, open_source
from petals_eval.model.tensor_files import open_index, open_tensors

if TYPE_CHECKING:
    from petals_eval.model.checkpoint import Checkpoint

__all__ = ["Adapter", "load_adapter", "named_adapters"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_INDEX = ".index.json"
# What trainers leave beside a checkpoint.
_NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler")


@isolated_arithmetic()
def load_adapter(
    path_or_hub: str | Path,
    *,
    family: Family,
    config: Any,
    checkpoint: "Checkpoint | None" = None,
    task: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Adapter:
    """Load tuned prompts for a model of this `family` and `config`.

    path_or_hub: a file or a folder, or a hub repository. A folder with an `adapter_config.json` is PEFT's; any other
    holds one checkpoint (`.pt`, `.bin`, `.ckpt`, `.safetensors`, or shards with an index) of Petals' `ptune` or
    `deep_ptune`, or of a whole PEFT model.
    checkpoint: the model's own, which a whole model's state dict is held against; without it one is refused.
    task: of prompts for several tasks (PEFT's MULTITASK_PROMPT_TUNING) the one to take, counted from 0.

    Raises AdapterError, saying what was expected and what was found, for anything else: LoRA and prefix tuning, missing
    or misshapen tensors, tensors that would be left out though they matter, values that are not finite, pickles that
    would run code.
    """
    path = local_path(path_or_hub)
    if _is_petals_file(path):
        reader = AdapterReader(path, open_tensors(path, AdapterError), family, config, checkpoint)
        return _read(reader, path.name, task)
    source = _source(path_or_hub, revision=revision, token=token, cache_dir=cache_dir)
    peft_config = source.find(PEFT_CONFIG)
    if peft_config is not None:
        return _load_peft(source, peft_config, family, config, checkpoint, task)
    return _load_checkpoint(source, family, config, checkpoint, task)


def named_adapters(given: Sequence[str | tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the name and the place of each adapter; nothing is read.

    given: a place, or the name and the place. Without a name it is called by the last part of its path or its hub name,
    and where several end alike, by the nearest part above in which they differ.

    Raises AdapterError for a wrong path.
    """
    parts = [_parts(each) for each in given if isinstance(each, str)]
    names = iter([_told_apart(own, [each for each in parts if each[-1] == own[-1]]) for own in parts])
    return [(next(names), each) if isinstance(each, str) else each for each in given]


def _parts(place: str) -> tuple[str, ...]:
    """Return the parts of the path that an adapter lies at; a hub name is one part."""
    path = local_path(place)
    if _is_petals_file(path):
        return path.absolute().parts
    source = _source(place)
    return source.path.resolve().parts if isinstance(source, Folder) else (source.name,)


def _told_apart(own: tuple[str, ...], alike: list[tuple[str, ...]]) -> str:
    """Return a name for the path `own` among those that end as it does, itself among them.

    >>> [_told_apart(own, [("a", "1", "p"), ("b", "1", "p")]) for own in (("a", "1", "p"), ("b", "1", "p"))]
    ['a', 'b']
    >>> alike = [("a", "1", "p"), ("a", "2", "p"), ("b", "1", "p")]
    >>> [_told_apart(own, alike) for own in alike]
    ['a-1', 'a-2', 'b-1']
    """
    # What stands in one place of all paths, from the last part up; a shorter path has nothing in the highest.
    levels = list(zip_longest(*(reversed(path) for path in alike), fillvalue=""))
    mine = dict(enumerate(reversed(own)))
    differing = [level for level, parts in enumerate(levels) if len(set(parts)) > 1 and level in mine]
    telling = next((level for level in differing if len(set(levels[level])) == len(alike)), None)
    chosen = differing if telling is None else [telling]
    return "-".join(mine[level] for level in reversed(chosen)) or own[-1]


def _is_petals_file(path: Path) -> bool:
    is_peft = path.name == PEFT_CONFIG or (path.name in PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file())
    return path.is_file() and not is_peft


def _source(place: str | Path, **options: Any) -> Source:
    path = local_path(place)
    return Folder(path.parent, AdapterError) if path.is_file() else open_source(place, error=AdapterError, **options)


def _load_peft(
    source: Source,
    config_path: Path,
    family: Family,
    config: Any,
    checkpoint: "Checkpoint | None",
    task: int | None,
) -> Adapter:
    peft_config = read_peft_config(config_path)
    weights = first_found(source, PEFT_WEIGHTS)
    if weights is None:
        raise AdapterError(f"{source} has an {PEFT_CONFIG} but no weights; expected {' or '.join(PEFT_WEIGHTS)}.")
    reader = AdapterReader(weights, open_tensors(weights, AdapterError), family, config, checkpoint)
    return read_peft(reader, peft_config, source.name, task)


def _load_checkpoint(
    source: Source, family: Family, config: Any, checkpoint: "Checkpoint | None", task: int | None
) -> Adapter:
    path = source.find(_the_checkpoint(source))
    if path is None:
        raise AdapterError(f"{source} changed while it was read; try again.")
    is_index = path.name.endswith(_INDEX)
    tensors = open_index(source, path, AdapterError) if is_index else open_tensors(path, AdapterError)
    return _read(AdapterReader(path, tensors, family, config, checkpoint), source.name, task)


def _read(reader: AdapterReader, name: str, task: int | None) -> Adapter:
    return read_peft_model(reader, name, task) if holds_peft_model(reader) else read_petals(reader, name)


def _the_checkpoint(source: Source) -> str:
    """Return the name of the one file, or the one index of shards, that holds the checkpoint."""
    names = [name for name in source.filenames() if not name.startswith(_NOT_WEIGHTS)]
    if "encoder.pt" in names:
        raise AdapterError(
            f"{source} is for a model with an encoder (caikit saves encoder.pt for such); expected prompts of a "
            "decoder alone, as it saves them in decoder.pt."
        )
    indexes = [name for name in names if name.endswith(_INDEX)]
    found = indexes or [name for name in names if name.endswith(_SUFFIXES)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError(
            f"{source} holds no adapter.\n  expected  {PEFT_CONFIG}, or one checkpoint ({', '.join(_SUFFIXES)})\n"
            f"  found     {', '.join(names[:8]) or 'no files'}{_adapters_within(source)}"
        )
    raise AdapterError(
        f"{source} holds several checkpoints: {', '.join(found[:8])}. Expected one; name the file that is meant."
    )


def _adapters_within(source: Source) -> str:
    """Return a line that names PEFT's adapters one folder down: there it saves one that is not called "default"."""
    within = sorted(source.path.glob(f"*/{PEFT_CONFIG}")) if isinstance(source, Folder) else []
    return f"\n  Name the adapter that is meant: {', '.join(str(each.parent) for each in within[:8])}" if within else ""

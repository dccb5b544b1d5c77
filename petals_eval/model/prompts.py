"""Loading a prompt-tuned checkpoint, whichever way it was saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals_eval.errors import AdapterError
from petals_eval.model.adapter import Adapter, AdapterReader
from petals_eval.model.arithmetic import isolated_arithmetic
from petals_eval.model.families import Family
from petals_eval.model.peft_prompts import PEFT_CONFIG, PEFT_WEIGHTS, read_peft, read_peft_config
from petals_eval.model.petals_prompts import read_petals
from petals_eval.model.sources import Folder, Source, first_found, open_source
from petals_eval.model.tensor_files import open_index, open_tensors

if TYPE_CHECKING:
    from petals_eval.model.checkpoint import Checkpoint

__all__ = ["Adapter", "adapter_name", "load_adapter"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
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
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Adapter:
    """Load tuned prompts for a model of this `family` and `config`.

    path_or_hub: a file or a folder, or a hub repository. A folder with an `adapter_config.json` is PEFT's; any other
    holds one checkpoint (`.pt`, `.bin`, `.safetensors`, or shards with an index) of Petals' `ptune` or `deep_ptune`.
    checkpoint: the model's own, which a whole model's state dict is held against; without it one is refused.

    Raises AdapterError, saying what was expected and what was found, for anything else: LoRA and prefix tuning, missing
    or misshapen tensors, tensors that would be left out though they matter, values that are not finite, pickles that
    would run code.
    """
    path = Path(path_or_hub).expanduser()
    if _is_petals_file(path):
        reader = AdapterReader(path, open_tensors(path, AdapterError), family, config, checkpoint)
        return read_petals(reader, path.name)
    source = _source(path_or_hub, revision=revision, token=token, cache_dir=cache_dir)
    peft_config = source.find(PEFT_CONFIG)
    if peft_config is not None:
        return _load_peft(source, peft_config, family, config, checkpoint)
    return _load_petals(source, family, config, checkpoint)


def adapter_name(path_or_hub: str | Path) -> str:
    """Return the name that the adapter from there will have; nothing is read. Raises AdapterError for a wrong path."""
    path = Path(path_or_hub).expanduser()
    return path.name if _is_petals_file(path) else _source(path_or_hub).name


def _is_petals_file(path: Path) -> bool:
    is_peft = path.name == PEFT_CONFIG or (path.name in PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file())
    return path.is_file() and not is_peft


def _source(place: str | Path, **options: Any) -> Source:
    path = Path(place).expanduser()
    return Folder(path.parent, AdapterError) if path.is_file() else open_source(place, error=AdapterError, **options)


def _load_peft(
    source: Source, config_path: Path, family: Family, config: Any, checkpoint: "Checkpoint | None"
) -> Adapter:
    peft_config = read_peft_config(config_path)
    weights = first_found(source, PEFT_WEIGHTS)
    if weights is None:
        raise AdapterError(f"{source} has an {PEFT_CONFIG} but no weights; expected {' or '.join(PEFT_WEIGHTS)}.")
    reader = AdapterReader(weights, open_tensors(weights, AdapterError), family, config, checkpoint)
    return read_peft(reader, peft_config, source.name)


def _load_petals(source: Source, family: Family, config: Any, checkpoint: "Checkpoint | None") -> Adapter:
    path = source.find(_the_checkpoint(source))
    if path is None:
        raise AdapterError(f"{source} changed while it was read; try again.")
    is_index = path.name.endswith(_INDEX)
    tensors = open_index(source, path, AdapterError) if is_index else open_tensors(path, AdapterError)
    return read_petals(AdapterReader(path, tensors, family, config, checkpoint), source.name)


def _the_checkpoint(source: Source) -> str:
    """Return the name of the one file, or the one index of shards, that holds the checkpoint."""
    names = [name for name in source.filenames() if not name.startswith(_NOT_WEIGHTS)]
    indexes = [name for name in names if name.endswith(_INDEX)]
    found = indexes or [name for name in names if name.endswith(_SUFFIXES)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError(
            f"{source} holds no adapter.\n  expected  {PEFT_CONFIG}, or one checkpoint ({', '.join(_SUFFIXES)})\n"
            f"  found     {', '.join(names[:8]) or 'no files'}"
        )
    raise AdapterError(
        f"{source} holds several checkpoints: {', '.join(found[:8])}. Expected one; name the file that is meant."
    )

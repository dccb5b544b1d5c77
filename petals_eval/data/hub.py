"""Data sets of the Hugging Face hub, and local folders laid out like one, with errors that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from petals_eval.data.files import load_json
from petals_eval.data.scratch import scratch_folder
from petals_eval.data.source import DataSource, format_of
from petals_eval.data.tables import Readable, Table
from petals_eval.environment import local_path
from petals_eval.errors import DataError, MachineError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["load_folder", "load_hub"]

_SAVED = ("state.json", "dataset_dict.json")  # in what `save_to_disk` makes of a Dataset and of a DatasetDict
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_hub(source: DataSource) -> Table:
    """Load one split of a data set on the hub, through the cache of `datasets` (HF_DATASETS_CACHE says where that is).

    Its values have the types that `datasets` gives them, but csv files give texts as they are written there, unless the
    data set declares what a column means.

    Raises DataError for a name, subset or split that does not exist, a gated or private data set, and a hub that
    cannot be reached; the message lists what there is.
    """
    if not _HUB_NAME.fullmatch(source.path):
        raise DataError(
            f"{source.path!r} is neither a file nor the name of a data set on the hub, which looks like owner/name."
        )
    return Table(_load(source, source.path, cache=None))


def load_folder(source: DataSource) -> Readable:
    """Load one split of a local folder of data files, without the cache. Raises DataError as `load_hub` does.

    csv and JSON files are read as they are written, unless the folder declares what their columns mean. The folder may
    also be one that `datasets` saved by `save_to_disk`.
    """
    path = local_path(source.path)
    if any((path / name).is_file() for name in _SAVED):
        return Table(_load_saved(source, path))
    with scratch_folder() as folder:
        if files := _json_files(source, path, folder):
            try:
                return load_json(files)
            except UnicodeError as error:
                raise DataError(f"a file of the folder {source.path} is not utf-8: {error}") from None
        return Table(_load(source, str(path), cache=folder))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the screen inside the block; afterwards they are as they were."""
    from datasets.utils import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _json_files(source: DataSource, path: Path, cache: str) -> list[Path]:
    """Return the split's files where they are plain JSON and nothing is declared of their columns; otherwise none."""
    import datasets

    try:
        with _without_progress_bars():
            builder = datasets.load_dataset_builder(str(path), source.subset, cache_dir=cache)
    except (OSError, ValueError, RuntimeError):
        return []  # loading it will say what is wrong
    by_split = getattr(builder.config, "data_files", None) or {}
    if builder.info.features is not None or getattr(builder.config, "field", None) is not None:
        return []
    split = source.split if source.split is not None or len(by_split) != 1 else next(iter(by_split))
    files = [Path(file) for file in by_split.get(split, ())]
    return files if all(format_of(file.name) == "jsonl" and file.is_file() for file in files) else []


def _load(source: DataSource, path: str, cache: str | None) -> "Dataset":
    import datasets

    token = source.token.get_secret_value() if source.token is not None else None

    def load(**reading: object) -> "Dataset":
        settings = {"split": source.split, "revision": source.revision, "token": token, "cache_dir": cache}
        return _only_split(source, datasets.load_dataset(path, source.subset, **settings, **reading))

    try:
        with _without_progress_bars():
            loaded = load()
            if loaded.info.builder_name == "csv" and _has_plain_types(loaded):
                # Their reader takes 00 for a number and NA for nothing. Once the names of the columns are known, it can
                # be told that all of them are texts.
                texts = datasets.Features({name: datasets.Value("string") for name in loaded.column_names})
                loaded = load(features=texts, keep_default_na=False)
    except PermissionError as error:
        raise MachineError(
            f"cannot write the cache of datasets: {error}. Set HF_DATASETS_CACHE to another folder."
        ) from error
    # What datasets and huggingface_hub raise for names, subsets, splits, gates and the network differs from version to
    # version, but all of it is one of these; StopIteration is what datasets 5 makes of a file without rows.
    except (OSError, ValueError, RuntimeError, datasets.builder.DatasetGenerationError, StopIteration) as error:
        raise DataError(_explain(source, error)) from error
    return loaded


def _load_saved(source: DataSource, path: Path) -> "Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
        if source.split is None:
            return _only_split(source, saved)
        if isinstance(saved, datasets.Dataset):
            raise DataError(f"the folder {source.path} holds one data set without splits: leave split out.")
        if source.split not in saved:
            raise ValueError(f"no such split among [{', '.join(sorted(saved))}]")
        return saved[source.split]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_explain(source, error)) from error


def _only_split(source: DataSource, loaded: "Dataset | DatasetDict") -> "Dataset":
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) != 1:
        splits = ", ".join(sorted(loaded))
        raise DataError(f"{source.path} has several splits: {splits}. Say which one is to be evaluated (split).")
    return next(iter(loaded.values()))


def _has_plain_types(loaded: "Dataset") -> bool:
    """Return whether no column has a meaning that its data set declares, such as class names."""
    import datasets

    return all(isinstance(feature, datasets.Value) for feature in loaded.features.values())


def _explain(source: DataSource, error: Exception) -> str:
    """Return what went wrong and what to do, by what the message of `datasets` says."""
    text = " ".join(str(error).split()) or type(error).__name__
    lowered = text.lower()
    if "split" in lowered and isinstance(error, ValueError):
        return f"{source.path} has no split {source.split!r}. The splits there are: {_names_in(text)}."
    if "config name is missing" in lowered:
        return f"{source.path} has several subsets: {_names_in(text)}. Say which one is meant (subset)."
    if "builderconfig" in lowered:
        return f"{source.path} has no subset {source.subset!r}. The subsets there are: {_names_in(text)}."
    is_folder = local_path(source.path).is_dir()  # whose name may hold any number
    if re.search(r"\bgated\b|\b401\b|\b403\b", lowered) and "doesn't exist" not in lowered and not is_folder:
        return (
            f"{source.path} is gated or private on the hub: ask for access on "
            f"https://huggingface.co/datasets/{source.path}, then run `hf auth login` or give a token. "
            f"(datasets says: {text})"
        )
    if "scripts are no longer supported" in lowered:
        return (
            f"{source.path} is a data set with a loading script, which today's datasets does not run. "
            "Most have a copy without one: set revision: refs/convert/parquet."
        )
    if is_folder:
        return f"the folder {source.path} holds no data that can be loaded: {text} Give the path of a file."
    if isinstance(error, FileNotFoundError) and not isinstance(error, ConnectionError):
        revision = f" at revision {source.revision}" if source.revision else ""
        return (
            f"there is no file {source.path} here and no data set {source.path} on the hub{revision}. A hub name looks "
            f"like owner/name; a private data set needs a token. (datasets says: {text})"
        )
    if isinstance(error, OSError):
        return (
            f"there is no file {source.path} here, and the hub cannot be reached for a data set of that name. "
            f"Check the network, or give the path of a local file. (datasets says: {text})"
        )
    cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
    return f"{source.path} cannot be loaded: {text}{cause}"


def _names_in(text: str) -> str:
    """Return the names in the first [...] of a message of `datasets`, or the message itself."""
    found = re.search(r"\[([^]]*)\]", text)
    return found.group(1).replace("'", "") if found else text

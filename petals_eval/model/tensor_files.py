"""Named tensors from safetensors and pickled files. Nothing in a file is ever run.

A safetensors file is opened lazily; a pickled one is memory-mapped where its format allows. Pickles are read by torch's
restricted unpickler with two classes more than plain weights: `nn.Embedding` and `nn.Linear`, because Petals' own
recipe saves tuned prompts as whole modules (https://github.com/bigscience-workshop/petals/issues/268). Both are inert;
their weights are taken out and the modules dropped.
"""

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from petals_eval.data.first_bytes import PICKLED, what_it_is
from petals_eval.errors import CallerError
from petals_eval.model.sources import Source
from petals_eval.text import listed, printable

__all__ = ["Tensors", "describe", "open_index", "open_tensors", "shown_name", "tensor_bytes"]

_ALLOWED: list[Any] = [nn.Embedding, nn.Linear]
# A file with one of these holds its tensors one level down.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What trainers keep beside the weights in one file. Tensors in any other dictionary may be needed.
_BESIDE_WEIGHTS = ("optimizer", "scheduler", "lr_scheduler", "scaler", "rng", "callbacks", "loops", "hyper_parameters")
_MAX_DEPTH = 4  # dictionaries within each other that are looked into
# What has no name is one of these, in this order: Petals' recipe saves a tuple of modules, others write them into one
# file one after the other, or as tensors; caikit and TGIS keep the first alone, a tensor in decoder.pt.
_BARE_MODULES = ("prompt_embeddings", "intermediate_prompt_embeddings", "score")
_OF_A_MODULE = ({"weight"}, {"weight", "bias"})  # keys of the state dict of one such module
# What a truncated, damaged or hostile file makes the readers raise.
_PICKLE_PROBLEMS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Tensors(Protocol):
    """Named tensors. Taking one reads it; the others stay on disk."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where telling it would mean opening one more file."""

    def take(self, name: str) -> torch.Tensor: ...


class _Safetensors:
    def __init__(self, path: Path, error: type[CallerError]):
        self._path = path
        self._error = error
        with self._reading() as file:
            self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def take(self, name: str) -> torch.Tensor:
        with self._reading() as file:
            return file.get_tensor(name)

    def _reading(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(self._path, error, self._error) from error


class _Loaded:
    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def take(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _Sharded:
    """The tensors of several files, by their index. A file is fetched and opened when first a tensor of it is taken."""

    def __init__(self, source: Source, weight_map: Mapping[str, str], error: type[CallerError]):
        self._source = source
        self._weight_map = weight_map
        self._error = error
        self._open: dict[str, Tensors] = {}

    def names(self) -> list[str]:
        return list(self._weight_map)

    def shape(self, name: str) -> tuple[int, ...] | None:
        shard = self._open.get(self._weight_map[name])
        return None if shard is None else shard.shape(name)

    def take(self, name: str) -> torch.Tensor:
        filename = self._weight_map[name]
        if filename not in self._open:
            path = self._source.find(filename)
            if path is None:
                raise self._error(
                    f"{self._source} lacks {filename}, which its index says holds {name}. Fetch it again."
                )
            self._open[filename] = open_tensors(path, self._error)
        shard = self._open[filename]
        if name not in shard.names():
            raise self._error(f"{self._source}: the index says {filename} holds {name}, but it does not.")
        return shard.take(name)


def open_tensors(path: Path, error: type[CallerError]) -> Tensors:
    """Open one file: `.safetensors`, or else a pickled one. Raises `error` if it cannot be read or would run code."""
    try:
        with path.open("rb") as file:
            meaning = what_it_is(file, b"PK\x03\x04", *PICKLED)  # torch's own files are zip archives, and older pickles
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem
    if meaning is not None:
        raise error(f"{path} holds no tensors: it is {meaning}.")
    if path.suffix == ".safetensors":
        return _Safetensors(path, error)
    return _Loaded(_flatten(_unpickle(path, error), path, error))


def open_index(source: Source, index: Path, error: type[CallerError]) -> Tensors:
    """Open the shards that an index file (`*.index.json`) names. Raises `error` if it is no such file."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(filename, str) for filename in weight_map.values()):
            raise TypeError("a file's name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise error(f"{index} is not an index of weight files: expected a `weight_map`.") from problem
    return _Sharded(source, weight_map, error)


_MAX_NAME_CHARACTERS = 100  # characters of a tensor's name, which whoever wrote the file chose


def shown_name(name: str) -> str:
    """Return a tensor's name, safe on a terminal."""
    return printable(name, longest=_MAX_NAME_CHARACTERS)


def describe(tensors: Tensors, limit: int = 8) -> str:
    """Return the names and shapes in a file for an error message, those that matter for prompts first."""
    names = sorted(tensors.names(), key=lambda name: ("prompt" not in name, "score" not in name))
    return listed((_with_shape(name, tensors.shape(name)) for name in names), most=limit) or "no tensors"


def _with_shape(name: str, shape: tuple[int, ...] | None) -> str:
    return shown_name(name) if shape is None else f"{shown_name(name)} {shape}"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as they lie in memory, row by row, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _unpickle(path: Path, error: type[CallerError]) -> list[Any]:
    """Return every object in a pickled file: one, or several that were saved one after the other."""
    try:
        if not zipfile.is_zipfile(path):  # before torch 1.6
            return [_load(path, mmap=False)]
        if _is_one_archive(path):
            return [_load(path, mmap=True)]
        return [_load(io.BytesIO(part), mmap=False) for part in _archives(path.read_bytes())]
    except _PICKLE_PROBLEMS as problem:
        raise _unreadable(path, problem, error) from problem


def _load(file: Path | io.BytesIO, *, mmap: bool) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                # torch would unpack it whole, whatever comes out of it, or take it for numbers as it is
                raise pickle.UnpicklingError("its parts are compressed, and torch compresses none")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with torch.serialization.safe_globals(_ALLOWED):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _archives(data: bytes) -> Iterator[bytes]:
    """Cut zip archives that were written one after the other (torch reads only a file that is one archive)."""
    start = mark = 0
    while (mark := data.find(b"PK\x05\x06", mark) + 1) > 0:  # the signature of an archive's last record, 22 bytes
        part = data[start : mark + 21]
        if _is_one_archive(io.BytesIO(part)):  # not so where the signature is part of a tensor
            yield part
            start += len(part)


def _is_one_archive(file: Path | io.BytesIO) -> bool:
    """Return whether this is one whole zip archive with nothing in front of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return min((item.header_offset for item in archive.infolist()), default=-1) == 0
    except (zipfile.BadZipFile, struct.error, ValueError):
        return False


def _flatten(objects: list[Any], path: Path, error: type[CallerError]) -> dict[str, torch.Tensor]:
    """Return the tensors of unpickled objects: those of modules as `name.weight`, of dictionaries as `name.key`."""
    tensors: dict[str, torch.Tensor] = {}
    parts = [part for each in objects for part in (each if isinstance(each, list | tuple) else [each])]
    for index, value in enumerate(parts):
        # One alone may be a trained head's as well as prompts': only among others does its place say what it is.
        is_of_a_module = isinstance(value, dict) and len(parts) > 1 and value.keys() in _OF_A_MODULE
        if isinstance(value, torch.Tensor):
            value, is_of_a_module = {"weight": value}, True
        if isinstance(value, nn.Module) or is_of_a_module:
            if index >= len(_BARE_MODULES):
                raise error(
                    f"{path} holds {len(parts)} modules without names; expected {' and '.join(_BARE_MODULES)} at most. "
                    "Save a state dict (names and tensors)."
                )
            value = {_BARE_MODULES[index]: value}
        if not isinstance(value, dict):
            raise error(f"{path} holds a {type(value).__name__}; expected a state dict (names and tensors).")
        _join(tensors, _named(value, _MAX_DEPTH, path, error), path, error)
    return tensors


def _named(values: dict[Any, Any], depth: int, path: Path, error: type[CallerError]) -> dict[str, torch.Tensor]:
    """Return all tensors in `values` and in the dictionaries within, without what trainers keep beside the weights."""
    found: dict[str, torch.Tensor] = {}
    for key, item in values.items():
        name = str(key)
        if isinstance(item, nn.Module):
            # Through vars(): attributes of an unpickled module are whatever the file says they are.
            parameters = vars(item).get("_parameters")
            item = parameters if isinstance(parameters, dict) else {}
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu":
                raise error(
                    f"{path}: {shown_name(name)} is a tensor on {item.device} in layout {item.layout}; expected a "
                    "dense one on the CPU. Save it as one: tensor.to_dense().cpu()."
                )
            _join(found, {name: item}, path, error)
        elif isinstance(item, dict) and depth and not name.startswith(_BESIDE_WEIGHTS):
            within = _named(item, depth - 1, path, error)
            is_wrapper = name in _WRAPPERS
            _join(found, within if is_wrapper else {f"{name}.{key}": each for key, each in within.items()}, path, error)
    return found


def _join(
    found: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor], path: Path, error: type[CallerError]
) -> None:
    """Add `more` to `found`. Raises `error` for a name that both have: one of the two would be left out."""
    for name, tensor in more.items():
        if name in found:
            raise error(
                f"{path} holds {shown_name(name)} twice, in different places. Expected one model; save its state dict "
                "alone."
            )
        found[name] = tensor


def _unreadable(path: Path, problem: Exception, error: type[CallerError]) -> CallerError:
    text = str(problem)
    asked_for = re.search(r"GLOBAL (\S+)", text)  # what torch's restricted unpickler was asked to find and call
    if asked_for or "Only persistent_load of storage" in text:
        what = asked_for.group(1) if asked_for else "a module in the format of torch before 1.6"
        return error(
            f"{path} is refused: opening it would run code or build other objects than tensors ({what}); "
            "nothing of it was run.\n"
            "  Expected tensors by name. Save a state dict: torch.save(model.state_dict(), ...), or safetensors."
        )
    lines = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()
    reason = (lines[0] if lines else "no more said").partition(". ")[0]
    return error(
        f"{path} cannot be read as {path.suffix or 'weights'} ({type(problem).__name__}: {reason}). "
        "Expected tensors by name; is the file complete?"
    )

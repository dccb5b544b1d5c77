"""What is read from files that somebody else made, each as a function of bytes that they chose.

Files lie in memory where the machine has a folder there. `guarded` watches what Python tells its auditors of: nothing
in a checkpoint, a task or a table may start a process, connect, or write outside of the folder that the input lies in.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save

from petals_eval.cli.run import read_settings
from petals_eval.data import DataSource, load_rows
from petals_eval.errors import AdapterError, CallerError, ConfigError, DataError, ModelError, TaskError
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.model.families import FAMILIES
from petals_eval.model.prompts import load_adapter
from petals_eval.model.tensor_files import open_tensors
from petals_eval.tasks.library import load_task
from tests.hostile.from_the_network import Target

_SHARED = Path("/dev/shm")
_FOLDER = Path(tempfile.mkdtemp(prefix="petals-eval-hostile-", dir=_SHARED if os.access(_SHARED, os.W_OK) else None))
_CONFIG = SimpleNamespace(hidden_size=4, num_hidden_layers=2, max_position_embeddings=64, model_type="llama")
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "os.symlink", "os.link", "os.chmod", "webbrowser.open"),
)
_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching:
        return
    if event in _FORBIDDEN:
        _watching[-1].append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        if path and not str(path).startswith((str(_FOLDER), tempfile.gettempdir(), "/dev/")):
            _watching[-1].append(f"open {path} {arguments[1]}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Raises AssertionError where anything in here starts a process, connects or writes elsewhere."""
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.remove(seen)
    if seen:
        raise AssertionError(f"an input made the reader do this: {seen[0]}")


def _reading(name: str, data: bytes, read: Callable[[Path], object], *errors: type[CallerError]) -> None:
    """Lay a file there and read it; only these errors may come of it, with words a terminal may show."""
    path = _FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        with guarded():
            read(path)
    except errors as error:
        if len(str(error)) > 20_000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error


def _take_all(path: Path) -> None:
    tensors = open_tensors(path, AdapterError)
    for name in tensors.names():
        tensors.take(name)


def _adapter(path: Path) -> object:
    return load_adapter(str(path), family=FAMILIES["llama"], config=_CONFIG)


def safetensors(data: bytes) -> None:
    """model.tensor_files on .safetensors, and the adapter in it."""
    _reading("a.safetensors", data, _adapter, AdapterError)


def torch_file(data: bytes) -> None:
    """model.tensor_files on a .bin as it is."""
    _reading("a.bin", data, _take_all, AdapterError)


def pickle_in_archive(data: bytes) -> None:
    """The same with a whole archive around the pickle, so that inputs reach torch's unpickler and not its checksums."""
    _reading("b.bin", archive(data), _adapter, AdapterError)


def archive(pickled: bytes, storage: bytes = bytes(64)) -> bytes:
    """What torch.save writes around a pickle."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for number in (0, 1):
            file.writestr(f"archive/data/{number}", storage)
        file.writestr("archive/version", b"3\n")
    return written.getvalue()


def peft_config(data: bytes) -> None:
    """adapter_config.json beside well-formed weights."""
    weights = _FOLDER / "peft" / "adapter_model.safetensors"
    if not weights.is_file():
        weights.parent.mkdir(exist_ok=True)
        weights.write_bytes(save({"prompt_embeddings": torch.ones(3, 4)}))
    _reading("peft/adapter_config.json", data, lambda path: _adapter(path.parent), AdapterError)


def model_config(data: bytes) -> None:
    """config.json of a model."""
    _reading("model/config.json", data, lambda path: Checkpoint.open(str(path.parent)), ModelError)


def task(data: bytes) -> None:
    """A task's YAML file."""
    _reading("task.yaml", data, load_task, TaskError)


def settings(data: bytes) -> None:
    """The YAML file of --config."""
    _reading("run.yaml", data, lambda path: read_settings(path, {}), ConfigError)


def _rows(path: Path) -> None:
    for row in load_rows(DataSource(path=str(path))):
        dict(row.columns)


def _table(suffix: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        _reading(f"rows.{suffix}", data, _rows, DataError)

    read.__doc__ = f"data.files on .{suffix}"
    return read


def _saved(value: object) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def _pickled(value: object) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))


_TABLE = pyarrow.table({"text": ["a", "b"], "label": [0, 1], "kind": pyarrow.array(["x", "y"]).dictionary_encode()})


def _parquet() -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(_TABLE, written)
    return written.getvalue()


def _arrow(new: Callable[..., pyarrow.ipc.RecordBatchStreamWriter]) -> bytes:
    written = io.BytesIO()
    with new(written, _TABLE.schema) as writer:
        writer.write_table(_TABLE)
    return written.getvalue()


_PTUNE = {"transformer.prompt_embeddings.weight": torch.ones(3, 4), "score.weight": torch.ones(2, 4)}
_TASK = b"name: t\ntext: '{text}'\nlabel_column: label\nlabel_names: [a, b]\nmax_length: 8\nmetrics: [accuracy]\n"
_LLAMA = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 8}

TARGETS: dict[str, Target] = {
    "safetensors": Target(safetensors, (save(_PTUNE), save({}))),
    "torch file": Target(torch_file, (_saved(_PTUNE), _saved(torch.nn.Embedding(3, 4)))),
    "pickle": Target(pickle_in_archive, (_pickled(_PTUNE), _pickled({"model": _PTUNE}))),
    "peft config": Target(peft_config, (json.dumps({"peft_type": "PROMPT_TUNING", "token_dim": 4}).encode(),)),
    "model config": Target(model_config, (json.dumps(_LLAMA).encode(),)),
    "task": Target(task, (_TASK, b"a: &a [x]\nb: [*a, *a]\n"), longest=2000),
    "settings": Target(settings, (b"model: m\ntask: trec\nlocal_swarm: 2\n",), longest=2000),
    "csv": Target(_table("csv"), (b'text,label\na,0\n"b,c",1\n',), longest=500),
    "tsv": Target(_table("tsv"), (b"text\tlabel\na\t0\n",), longest=500),
    "txt": Target(_table("txt"), (b"DESC:manner How\n",), longest=500),
    "jsonl": Target(
        _table("jsonl"),
        (b'{"text": "a", "label": 0}\n{"text": "b"}\n', b'[{"a": -1.5e3}, {\n"b": [true, "\\ud83d\\ude00"]}]'),
        longest=500,
    ),
    "parquet": Target(_table("parquet"), (_parquet(),)),
    "arrow": Target(_table("arrow"), (_arrow(pyarrow.ipc.new_stream), _arrow(pyarrow.ipc.new_file))),
    "gzip": Target(_table("csv.gz"), (gzip.compress(b"text,label\na,0\n"),)),
    "bzip2": Target(_table("csv.bz2"), (bz2.compress(b"text,label\na,0\n"),)),
    "xz": Target(_table("csv.xz"), (lzma.compress(b"text,label\na,0\n"),)),
}

__all__ = ["TARGETS", "archive", "guarded"]

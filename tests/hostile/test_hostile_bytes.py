"""Inputs that hypothesis draws for everything that is decoded, and those that were found to do harm.

Few here, to be quick; `scripts/fuzz.py` gives the same targets millions.
"""

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals_eval.errors import AdapterError
from petals_eval.model.tensor_files import open_tensors
from tests.hostile import from_files, from_the_network
from tests.hostile.from_files import archive, guarded

NETWORK = from_the_network.TARGETS
FILES = from_files.TARGETS
BOUND = 16 << 20
"""Bytes that an input of a few kilobytes may make a decoder of the network allocate."""


def mutated(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """A seed with some bytes changed, cut out, or put in."""

    def change(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for place, cut, put in edits:
            place %= len(seed) + 1
            seed = seed[:place] + put + seed[place + cut :]
        return seed

    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 4), st.binary(max_size=4))
    return st.builds(change, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=4)) | st.binary(max_size=300)


@pytest.mark.parametrize("name", NETWORK)
def test_what_comes_from_the_network_is_read_or_refused(name):
    target = NETWORK[name]

    @settings(max_examples=300, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(target.seeds))
    def check(data):
        target.run(data)

    for seed in target.seeds:
        target.run(seed)
    tracemalloc.start()
    try:
        check()
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FILES)
def test_what_comes_from_files_is_read_or_refused(name):
    target = FILES[name]

    @settings(max_examples=25, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated(target.seeds))
    def check(data):
        target.run(data)

    for seed in target.seeds:
        target.run(seed)
    check()


class Touch:
    """Unpickled by anybody who does not look, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Calls:
    def __init__(self, function, *arguments):
        self.it = (function, arguments)

    def __reduce__(self):
        return self.it


@pytest.mark.parametrize("wrap", ["bare", "archive", "state dict", "old torch"])
@pytest.mark.parametrize("what", ["open", "eval", "os.system", "torch.load", "setattr"])
def test_no_pickle_runs_anything(wrap, what, tmp_path):
    touched = tmp_path / "touched"
    import os

    code = f"open({str(touched)!r}, 'w')"
    evil = {
        "open": Touch(touched),
        "eval": Calls(eval, code),
        "os.system": Calls(os.system, f"touch {touched}"),
        "torch.load": Calls(torch.load, str(tmp_path / "other")),
        "setattr": Calls(setattr, torch.nn.Linear, "forward", None),
    }[what]
    path = tmp_path / "evil.bin"
    if wrap == "bare":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif wrap == "archive":
        path.write_bytes(archive(pickle.dumps(evil, protocol=2)))
    elif wrap == "state dict":
        torch.save({"model": {"prompt_embeddings.weight": torch.ones(2, 2), "x": evil}}, path)
    else:
        torch.save({"x": evil}, path, _use_new_zipfile_serialization=False)
    with guarded(), pytest.raises(AdapterError, match=r"nothing of it was run|cannot be read"):
        open_tensors(path, AdapterError)
    assert not touched.exists()


def test_the_guard_sees_what_it_is_there_for(tmp_path):
    with pytest.raises(AssertionError, match=r"os\.system"), guarded():
        import os

        os.system("true")


def test_a_small_archive_that_unpacks_to_much_is_not_unpacked(tmp_path):
    """A storage of a gigabyte of zeros, a megabyte when compressed; torch itself never compresses."""
    written = io.BytesIO()
    plain = zipfile.ZipFile(io.BytesIO(saved(torch.ones(4))))
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as file:
        for name in plain.namelist():
            content = bytes(256 << 20) if name.endswith("data/0") else plain.read(name)
            file.writestr(name, content)
    path = tmp_path / "bomb.bin"
    path.write_bytes(written.getvalue())
    assert path.stat().st_size < 1 << 20
    with pytest.raises(AdapterError):
        open_tensors(path, AdapterError)


def saved(value) -> bytes:
    written = io.BytesIO()
    torch.save({"x": value}, written)
    return written.getvalue()


# -- found by the fuzzer, or on the way to it


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("task", b"[" * 5000),
        ("task", b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(9))),
        ("settings", b"[" * 5000),
        ("settings", b"model: &a [" + b"[" * 900 + b"]" * 900 + b"]\n"),
        ("peft config", b'{"peft_type": []}'),
        ("peft config", b'{"peft_type": {"a": 1}}'),
        ("peft config", b"[" * 100_000),
        ("peft config", b'{"peft_type": "PROMPT_TUNING", "num_transformer_submodules": "2"}'),
        ("model config", b"[" * 100_000),
        ("model config", b'{"model_type": []}'),
        ("model config", b'{"model_type": "llama", "num_hidden_layers": 1e999}'),
        ("jsonl", b'{"text": ' + b"[" * 100_000 + b"\n"),
        ("csv", b"a,b\n" + b"x" * 200_000 + b",1\n"),
        ("csv", b"a,b\n\x00,1\n"),
        ("csv", b"te\x00xt,label\na,0\n"),
        ("tsv", b"text\tlab\x00el\na\t0\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:24]),
)  # fmt: skip
def test_what_did_harm_once(name, data):
    FILES[name].run(data)

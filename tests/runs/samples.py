"""What the tests of this room have in common."""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from petals_eval.runs import AdapterRecord, DataRecord, Manifest, ModelRecord, ServerUsed
from petals_eval.tasks.requests import Prediction

LABELS = ("no", "maybe", "yes")
SERVERS = (
    ServerUsed("12D3KooWAlpha", 0, 3, "2.2.0", "float32", None),
    ServerUsed("12D3KooWBeta", 3, 5, "2.3.0.dev2", "bfloat16", "nf4"),
    ServerUsed("12D3KooWGamma", 3, 5),
)


def prediction(key: int | str, label: int = 0, n_labels: int = 3, n_tokens: int = 7) -> Prediction:
    """Seeded by its key: the same key is always predicted alike."""
    random = np.random.default_rng(zlib.crc32(str(key).encode()))
    scores = random.normal(size=n_labels)
    return Prediction(str(key), label, int(scores.argmax()), tuple((each,) for each in scores.tolist()), n_tokens)


def manifest(**changes: object) -> Manifest:
    given: dict = {
        "model": ModelRecord(name="stories260K-hf", sha256="aa" * 32),
        "adapters": [AdapterRecord(name="trec-ptune", kind="ptune", sha256="bb" * 32)],
        "data": DataRecord(name="test.txt", fingerprint="cc" * 32, limit=None, seed=0),
        "task": {"name": "trec", "text": "{question}", "label_names": list(LABELS), "max_length": 96},
        "answer_settings": {"dtype": "float32", "compression": "none"},
        "run_settings": {"max_tokens": 4096, "deadline": 600.0},
        "seeds": {"sample": 0, "bootstrap": 0},
    }
    return Manifest.new(**(given | changes))


@contextlib.contextmanager
def reachable_folder() -> Iterator[Path]:
    """A folder whose parents everybody may enter; pytest's own are for its user alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        folder.parent.chmod(0o755)
        try:
            yield folder
        finally:
            folder.chmod(0o755)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions bind inside, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)

"""Run folders of each kind of task, for the tests of pages: made by hand, so that every number is known."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from petals_eval.runs import AdapterRecord, DataRecord, RunFolder
from petals_eval.runs.manifest import NoisyServer, ServerUsed
from petals_eval.tasks.requests import Prediction
from tests.runs.samples import SERVERS, manifest

HOSTILE = "<script>document.title='taken'</script><img src=http://203.0.113.9/x onerror=alert(1)>$x$\"'&\u202e"

METRICS = {
    "classification": ["accuracy", "f1_macro", "ece"],
    "choice": ["acc"],
    "perplexity": ["token_perplexity", "bits_per_byte"],
    "generation": ["exact_match", "new_tokens"],
    "continuation": ["acc"],
    "regression": ["mse", "pearson"],
}
COLUMNS = {
    "classification": ("score",),
    "choice": ("log_likelihood", "characters", "bytes", "tokens", "unconditioned"),
    "perplexity": ("log_likelihood", "tokens", "words", "bytes"),
    "generation": ("new_tokens", "stopped_by_length", "exact_match[word]"),
    "continuation": ("log_likelihood", "is_greedy", "tokens", "characters"),
    "regression": ("score",),
}


def run_folder(
    path: Path,
    kind: str = "classification",
    *,
    rows: int = 120,
    labels: Iterable[str] = ("no", "maybe", "yes"),
    adapters: tuple[str, ...] = ("prompts",),
    servers: tuple[ServerUsed, ...] = SERVERS,
    noisy: tuple[NoisyServer, ...] = (),
    finished: bool = True,
    failed: int = 0,
) -> Path:
    """Make the folder of a run and return its path."""
    names = list(labels) if kind == "classification" else []
    said = manifest(
        kind=kind,
        answer_columns=COLUMNS[kind],
        adapters=[AdapterRecord(name=name, kind="ptune", sha256="bb" * 32) for name in adapters],
        data=DataRecord(name="test.txt", fingerprint="cc" * 32, rows=rows),
        task={"name": kind, "label_names": names},
        run_settings={"metrics": METRICS[kind], "label_names": names, "verify": 0.02},
    )
    with RunFolder.create(path, said, task=kind) as folder:
        for seed, name in enumerate(adapters):
            random = np.random.default_rng(seed)
            for key in range(rows - failed):
                folder.journal.add(name, _prediction(kind, key, random, len(names)), servers=servers, kind=kind)
            for key in range(rows - failed, rows):
                folder.journal.add_failure(name, str(key), 0, "no server takes it", kind=kind)
        folder.note_noisy(noisy)
        if finished:
            folder.finish(folder.result())
    return path


def _prediction(kind: str, key: int, random: np.random.Generator, n_labels: int) -> Prediction:
    n_tokens = int(random.integers(3, 80))
    if kind == "classification":
        label = key * 7 % 10 % n_labels
        scores = random.normal(size=n_labels)
        scores[label] += 1.5
        return Prediction(str(key), label, int(scores.argmax()), [(each,) for each in scores.tolist()], n_tokens)
    if kind == "choice":
        values = [(float(-random.gamma(4)), 10.0, 10.0, 3.0, 0.0) for _ in range(2 + key % 3)]
        best = int(np.argmax([value[0] for value in values]))
        return Prediction(str(key), key % 2, best, values, n_tokens)
    if kind == "perplexity":
        values = [(float(-30 - random.gamma(9) / (1 + part)), 20.0, 12.0, 60.0) for part in range(1 + key % 4)]
        return Prediction(str(key), None, None, values, n_tokens)
    if kind == "generation":
        return Prediction(str(key), None, None, [(float(1 + key % 9), 0.0, float(key % 2))], n_tokens)
    if kind == "continuation":
        return Prediction(str(key), None, None, [(float(-random.gamma(4)), float(key % 2), 3.0, 9.0)], n_tokens)
    label = key % 11 / 3
    predicted = label + float(random.normal(scale=0.3))
    return Prediction(str(key), label, predicted, [(predicted,)], n_tokens)

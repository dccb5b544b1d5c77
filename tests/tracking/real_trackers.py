"""Log a result to a real tracker, offline, and print what it holds then, as JSON: {run: {name: [[step, value], ...]}}.

    python -m tests.tracking.real_trackers TRACKER FOLDER

A result with names of labels that trackers refuse is logged twice: into a run that the call makes, and at the steps 0,
1 and 2 into one that is open, as that of a training loop. Run it where the tracker's package is installed.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petals_eval.metrics import Metric
from petals_eval.runs import AdapterRecord, AdapterResult, DataRecord, Manifest, ModelRecord, RunResult
from petals_eval.tracking import log_results, trackers_of

Held = dict[str, dict[str, list[list[float]]]]


def result_of(value: float = 0.75) -> RunResult:
    """A result with everything that a name may have in it."""
    metrics = {
        "accuracy": Metric("accuracy", value, (0.7, 0.8)),
        "f1[entity]": Metric("f1[entity]", 0.5),
        "f1[wo, bin: ich? ../]": Metric("f1[wo, bin: ich? ../]", 0.25),
        "roc_auc": Metric("roc_auc", None),
    }
    found = AdapterResult("prompts", 8, 0, 0, 80, 2.0, metrics, (), ())
    return RunResult("trec", {"prompts": found})


def manifest() -> Manifest:
    return Manifest.new(
        model=ModelRecord(name="stories", sha256="aa"),
        adapters=[AdapterRecord(name="prompts", kind="ptune", sha256="bb")],
        data=DataRecord(name="test.txt", fingerprint="cc"),
        task={"name": "trec"},
    )


def fail(line: str) -> None:
    raise SystemExit(line)


def log(name: str, place: str | None, value: float = 0.75, step: int | None = None) -> None:
    trackers = trackers_of([name if place is None else f"{name}={place}"])
    log_results(trackers, [(result_of(value), manifest())], step=step, say=fail)


@contextmanager
def wandb_run(folder: Path) -> Iterator[None]:
    import wandb

    with wandb.init(project="training", name="open") as run:
        run.log({"loss": 1.0}, step=500)  # far ahead of any epoch
        yield


def held_by_wandb(folder: Path) -> Held:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes the files
    found: Held = {}
    for path in sorted(folder.rglob("run-*.wandb")):
        name, series = "", dict[str, list[list[float]]]()
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            name = record.run.display_name or name
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key in (key for key in row if key.startswith("trec/")):
                series.setdefault(key, []).append([row.get("trec/step", -1), row[key]])
        found["open" if name == "open" else "own"] = series
    return found


def _log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after W&B's seven bytes.

    Blocks of 32 KiB hold fragments with a checksum (4 bytes), a length (2) and whether they are whole (1), the first
    (2), between (3) or the last (4).
    """
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@contextmanager
def trackio_run(folder: Path) -> Iterator[None]:
    import trackio

    trackio.init(project="training", name="open", embed=False)
    yield
    trackio.finish()


def held_by_trackio(folder: Path) -> Held:
    from trackio.sqlite_storage import SQLiteStorage

    found: Held = {}
    for project, name in (("petals-eval", "own"), ("training", "open")):
        for run in SQLiteStorage.get_runs(project):
            series: dict[str, list[list[float]]] = {}
            for row in SQLiteStorage.get_logs(project, run):
                for key, value in row.items():
                    if key.startswith("trec/"):
                        series.setdefault(key, []).append([row["step"], value])
            found[name] = series
    return found


@contextmanager
def mlflow_run(folder: Path) -> Iterator[None]:
    import mlflow

    with mlflow.start_run(run_name="open"):
        yield


def held_by_mlflow(folder: Path) -> Held:
    from mlflow import MlflowClient

    client = MlflowClient()
    found: Held = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            series = {
                key: [[each.step, each.value] for each in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            }
            found["open" if run.info.run_name == "open" else "own"] = series
    return found


@contextmanager
def no_run(folder: Path) -> Iterator[None]:
    yield


def held_by_tensorboard(folder: Path) -> Held:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Held = {}
    for place, name in ((folder / "petals-eval", "own"), (folder / "training", "open")):
        events = EventAccumulator(str(place)).Reload()
        found[name] = {
            tag: [[each.step, each.value] for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
    return found


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Held]]] = {
    "wandb": (wandb_run, held_by_wandb),
    "trackio": (trackio_run, held_by_trackio),
    "mlflow": (mlflow_run, held_by_mlflow),
    "tensorboard": (no_run, held_by_tensorboard),
}


def main(name: str, folder: Path) -> None:
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # mlflow-skinny has no other that needs no server
        "MLFLOW_TRACKING_URI": folder.as_uri() + "/mlruns",
    }
    os.chdir(folder)
    open_run, held = KINDS[name]
    log(name, None)
    with open_run(folder):
        for epoch in range(3):
            # TensorBoard has no open run: a folder is one.
            log(name, "training" if name == "tensorboard" else None, 0.5 + epoch / 8, step=epoch)
    sys.stdout.write(json.dumps(held(folder)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

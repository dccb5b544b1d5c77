"""A model in somebody's program: in a forked process, never closed, under another default device, with warnings as
errors."""

import gc
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import petals_eval
from petals_eval.demo import demo_paths
from petals_eval.errors import InterruptedRunError, MachineError, ModelError, PetalsEvalError
from petals_eval.evaluation.evaluate import _told_what_is_kept
from petals_eval.local_swarm import LocalSwarm
from petals_eval.remote_model import load_local
from petals_eval.runs.journal import Journal

SECONDS = 30.0


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm(demo_paths().model, servers=2, mode="thread") as running:
        yield running


def opened(swarm: LocalSwarm) -> petals_eval.RemoteModel:
    paths = demo_paths()
    return petals_eval.RemoteModel.from_pretrained(
        paths.model, adapter=paths.prompts, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
    )


def accuracy(model: petals_eval.RemoteModel) -> float | None:
    return petals_eval.evaluate(model, task=demo_paths().task, limit=20).metrics["accuracy"].value


def test_a_forked_process_is_told_that_the_connection_is_not_its_own(swarm: LocalSwarm) -> None:
    """No thread runs the connection's loop there: it would wait for ever, whatever its deadline."""
    with opened(swarm) as model:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = b"nothing was raised"
            try:
                accuracy(model)
            except PetalsEvalError as error:
                model.close()  # which does nothing there
                said = f"{error.exit_code} {error}".encode()
            finally:
                os.write(writing, said)
                os._exit(0)
        os.close(writing)
        said = os.read(reading, 1000).decode()
        os.close(reading)
        assert os.waitpid(pid, 0)[1] == 0
        assert said.startswith(f"2 the connection to the swarm belongs to process {os.getpid()}")
        assert "open a RemoteModel of its own" in said
        assert accuracy(model) == 1.0  # the child left it alone


def test_a_model_that_nobody_closes_goes_with_its_last_reference(swarm: LocalSwarm) -> None:
    ours = psutil.Process()

    def held() -> tuple[int, int, int]:
        return len(ours.children()), threading.active_count(), ours.num_fds()

    before = held()
    model = opened(swarm)
    assert accuracy(model) == 1.0
    assert held() > before
    del model
    gc.collect()
    end = time.monotonic() + SECONDS
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (before, held())


def test_another_default_device_changes_nothing(swarm: LocalSwarm) -> None:
    with opened(swarm) as model, torch.device("meta"):
        assert accuracy(model) == 1.0
    torch.set_default_device("meta")
    try:
        with opened(swarm) as model:
            assert accuracy(model) == 1.0
    finally:
        torch.set_default_device(None)


def test_a_program_that_makes_errors_of_warnings_can_import_what_it_needs() -> None:
    script = "from petals_eval.swarm import SwarmConnection; from petals_eval import RemoteModel, evaluate"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn"])
def test_a_dtype_that_no_server_computes_in_is_refused_at_once(dtype: str, tmp_path: Path) -> None:
    config = (demo_paths().model / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"dtype": "float32"', f'"dtype": "{dtype}"'))
    with pytest.raises(ModelError, match=f"stored in {dtype}, in which no server computes; expected one of float32"):
        LocalSwarm(tmp_path)
    assert LocalSwarm(tmp_path, dtype="bfloat16").num_blocks == 6


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_called_so(name: str, tmp_path: Path) -> None:
    shutil.copy(demo_paths().model / "config.json", tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
    with pytest.raises(ModelError, match="holds no tensors: it is a pointer of git lfs, not the file itself"):
        load_local(str(tmp_path))


def test_an_interrupt_is_not_swallowed_by_a_loop_over_runs(swarm: LocalSwarm, tmp_path: Path) -> None:
    class Interrupting:
        def update(self, done: int, *more: object, **values: object) -> None:
            if done:
                raise KeyboardInterrupt

        def waiting(self, message: str) -> None:
            pass

    with opened(swarm) as model, pytest.raises(KeyboardInterrupt) as caught:
        try:
            petals_eval.evaluate(model, task=demo_paths().task, progress=Interrupting(), out=tmp_path / "run")
        except Exception:  # noqa: BLE001  # as a caller's loop does
            pytest.fail("it was swallowed")
    assert isinstance(caught.value, InterruptedRunError)
    assert "Run the same command again to go on" in caught.value.__notes__[0]


def test_how_to_go_on_in_a_folder_that_was_named_by_the_clock() -> None:
    """The same command would begin another folder there, and send everything again."""
    journal = SimpleNamespace(path=Path("runs/t-2026"), journal=None)
    for out, says in ((None, "run it again with --out runs/t-2026"), (Path("r"), "Run the same command again")):
        scoring: Any = SimpleNamespace(prepared=SimpleNamespace(out=out), folder=journal, scored=lambda: 3, total=9)
        with pytest.raises(InterruptedRunError) as caught, _told_what_is_kept(scoring, kept=True):
            raise KeyboardInterrupt
        assert "3 of 9 examples are scored and kept in runs/t-2026." in caught.value.__notes__[0]
        assert says in caught.value.__notes__[0]


def test_a_journal_that_has_no_room_to_be_one_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path, create=True)

    class Full:
        """A connection to a disk that is full."""

        def __init__(self, connection: Any):
            self._connection = connection

        def execute(self, sql: str, *values: object) -> object:
            if "wal_checkpoint" in sql:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorname = "SQLITE_FULL"
                raise error
            return self._connection.execute(sql, *values)

        def __getattr__(self, name: str) -> object:
            return getattr(self._connection, name)

    journal._connection = Full(journal._connection)
    with pytest.raises(MachineError, match=r"complete only together with journal\.sqlite-wal beside it"):
        journal.close()
    journal.close()

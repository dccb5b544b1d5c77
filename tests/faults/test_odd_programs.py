"""A model in somebody's program: in a forked process, never closed, under another default device, with warnings as
errors."""

import gc
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import petals_eval
from petals_eval.demo import demo_paths
from petals_eval.errors import (
    InterruptedRunError,
    MachineError,
    ModelError,
    PetalsEvalError,
    SwarmError,
    SwarmUnreachableError,
)
from petals_eval.evaluation.evaluate import _told_what_is_kept
from petals_eval.local_swarm import LocalSwarm
from petals_eval.remote_model import load_local
from petals_eval.runs.journal import Journal
from petals_eval.runs.schema import blame_sqlite

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


def held() -> tuple[int, int, int]:
    """How many processes, threads and descriptors are ours."""
    ours = psutil.Process()
    return len(ours.children(recursive=True)), threading.active_count(), ours.num_fds()


def comes_back_to(before: tuple[int, int, int]) -> bool:
    """Whether no more is held than then, at once or a little later."""
    gc.collect()
    end = time.monotonic() + SECONDS
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.05)
    return all(now <= then for now, then in zip(held(), before, strict=True))


def _never_close(swarm: LocalSwarm) -> None:
    assert accuracy(opened(swarm)) == 1.0  # it goes with its last reference


def _close(swarm: LocalSwarm) -> None:
    with opened(swarm) as model:
        accuracy(model)


def _raise_within(swarm: LocalSwarm) -> None:
    with pytest.raises(ZeroDivisionError), opened(swarm) as model:
        accuracy(model)
        raise ZeroDivisionError


def _look_at_health(swarm: LocalSwarm) -> None:
    assert petals_eval.check_health(swarm.initial_peers).verdict is not None


def _find_nobody(swarm: LocalSwarm) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}/p2p/{swarm.initial_peers[0].rsplit('/')[-1]}"
        with pytest.raises(SwarmUnreachableError):
            petals_eval.RemoteModel.from_pretrained(demo_paths().model, initial_peers=[nobody], dht_prefix="x")


def _ask_for_a_name_that_nobody_announces(swarm: LocalSwarm) -> None:
    with pytest.raises(SwarmError):
        petals_eval.RemoteModel.from_pretrained(
            demo_paths().model, initial_peers=swarm.initial_peers, dht_prefix="nobody", deadline=5
        )


def _start_servers(swarm: LocalSwarm) -> None:
    with LocalSwarm(demo_paths().model, servers=1) as other:
        assert other.initial_peers


def _start_servers_that_cannot_be(swarm: LocalSwarm) -> None:
    with pytest.raises(PetalsEvalError), LocalSwarm(demo_paths().model, spans=[(5, 9)]):
        pass


ENDING = (
    *(_close, _never_close, _raise_within, _look_at_health, _find_nobody, _ask_for_a_name_that_nobody_announces),
    *(_start_servers, _start_servers_that_cannot_be),
)


@pytest.mark.sample(2)
@pytest.mark.parametrize("act", ENDING, ids=lambda act: act.__name__.strip("_"))
def test_nothing_of_ours_stays_behind(act: Callable[[LocalSwarm], None], swarm: LocalSwarm, tmp_path: Path) -> None:
    """Processes, threads, descriptors and temporary files, of what ended well and of what did not."""
    act(swarm)  # libraries keep a thread or a descriptor of their own from their first use on
    before = held()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        act(swarm)
    assert comes_back_to(before), (before, held())
    assert list(tmp_path.iterdir()) == []


JUMP = """if True:
    import sys, time
    real, jump = time.time, [0.0]
    time.time = lambda: real() + jump[0]  # before anybody keeps a reference to it
    import petals_eval
    from petals_eval.demo import demo_paths
    from petals_eval.local_swarm import LocalSwarm

    paths = demo_paths()
    with LocalSwarm(paths.model, servers=2, mode="thread") as swarm, petals_eval.RemoteModel.from_pretrained(
        paths.model, adapter=paths.prompts, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, deadline=60
    ) as model:
        for jump[0] in (0.0, float(sys.argv[1])):
            result = petals_eval.evaluate(model, task=paths.task, limit=40)
            print(result.metrics["accuracy"].value, result.first.n_failed)

"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("seconds", [3600, -3600, 1e8])
def test_a_clock_that_jumps(seconds: float) -> None:
    """By an hour, as after a sleep of the machine or a change of its time: a run goes by a clock that does not."""
    ended = subprocess.run([sys.executable, "-c", JUMP, str(seconds)], capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["1.0 0"] * 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SQLITE_BUSY", "Another process holds it: .* network file system"),
        ("SQLITE_IOERR_LOCK", "network file system"),
        ("SQLITE_IOERR_SHMMAP", "network file system"),
        ("SQLITE_PROTOCOL", "network file system"),
        ("SQLITE_IOERR_WRITE", "The disk failed to read or write"),
        ("SQLITE_FULL", "The disk is full"),
    ],
)
def test_what_is_said_of_a_journal_that_cannot_be_used(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=says), blame_sqlite(tmp_path / "journal.sqlite"):
        error = sqlite3.OperationalError("no")
        error.sqlite_errorname = name
        raise error


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#define WITHOUT_LOCKS(name) int name(int file, int command, ...) { \\
  va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest); \\
  if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) { errno = ENOLCK; return -1; } \\
  return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(file, command, argument); }
WITHOUT_LOCKS(fcntl)
WITHOUT_LOCKS(fcntl64)
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.mark.soak  # SQLite asks for 30 s
def test_a_file_system_without_locks(tmp_path: Path) -> None:
    """As NFS is without its lock daemon: the run ends with the reason, and does not wait for another one."""
    (tmp_path / "nolock.c").write_text(NO_LOCKS)
    build = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "nolock.so"), str(tmp_path / "nolock.c"), "-ldl"]
    subprocess.run(build, check=True)
    ended = subprocess.run(
        [sys.executable, "-m", "petals_eval", "demo", "--out", str(tmp_path / "run")],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "nolock.so")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 4, ended.stderr
    assert "network file system (NFS, SMB) that gives no locks" in ended.stderr and "Traceback" not in ended.stderr


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

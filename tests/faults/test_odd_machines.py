"""Every command under odd conditions: the exit code, the last line, and that nothing is left behind.

`python -m tests.faults.test_odd_machines` prints the pairs as a table in Markdown.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from petals_eval.demo import demo_paths

SECONDS = 150  # until a command must have ended; the machine may be busy
AS_IT_IS = '"$@"'
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    "HF_HUB_OFFLINE": "1",  # nobody here is to wait for a hub
}
GIVEN = (
    *("--model", "model", "--adapter", "prompts", "--task", "task.yaml", "--data", "data.jsonl"),
    *("--local-swarm", "1"),
)
PLACES = ("--model", "--adapter", "--task", "--data")
VERSION, RESULT, SHOWN, ROUTE = r"petals-eval \d", r"report: ", r"run folder: ", r"nothing was sent"


@dataclass(frozen=True)
class Odd:
    """A condition: a line of bash around the command ("$@"), and variables of the environment."""

    name: str
    shell: str = AS_IT_IS
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A command under a condition. last: matches in the last line that is said: on stderr where it fails."""

    command: str
    odd: Odd
    code: int = 0
    last: str = ""

    def __str__(self) -> str:
        return f"{self.command} | {self.odd.name}"


PLAIN = Odd("nothing odd")
STDIN_CLOSED = Odd("stdin closed", '"$@" <&-')
STDOUT_CLOSED = Odd("stdout closed", '"$@" >&-')
STDERR_CLOSED = Odd("stderr closed", '"$@" 2>&-')
ALL_CLOSED = Odd("stdin, stdout and stderr closed", '"$@" <&- >&- 2>&-')
STDOUT_FULL = Odd("stdout is full", '"$@" >/dev/full')
READER_LEFT = Odd("whoever reads stdout has left", 'set -o pipefail; "$@" | (exec <&-; sleep 60 & wait $!)')
ASCII = Odd("ascii alone can be shown", variables={"PYTHONIOENCODING": "ascii"})
CP932 = Odd("Windows' Japanese encoding", variables={"PYTHONIOENCODING": "cp932"})
EUC_JP = Odd("EUC-JP", variables={"PYTHONIOENCODING": "euc_jp"})
C_LOCALE = Odd("locale C", variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
WARNINGS = Odd("PYTHONWARNINGS=error", variables={"PYTHONWARNINGS": "error"})
OPTIMISED = Odd("python -OO", variables={"PYTHONOPTIMIZE": "2"})
NO_FOLDER = Odd("working folder deleted", 'mkdir gone; cd gone; rmdir "$PWD"; exec "$@"')
NO_TMP = Odd("TMPDIR is not there", variables={"TMPDIR": "/nowhere/at/all"})
LONG_TMP = Odd("TMPDIR too long for a socket", 'd=$PWD/$(printf "t%.0s" {1..120}); mkdir "$d"; TMPDIR=$d "$@"')
NO_HOME = Odd("HOME is not set", 'unset HOME; "$@"')
HOME_PROC = Odd("HOME cannot be written", variables={"HOME": "/proc"})
FEW_FILES = Odd("ulimit -n 8", 'ulimit -n 8; "$@"')
SOME_FILES = Odd("ulimit -n 64", 'ulimit -n 64; "$@"')
NO_GROWTH = Odd("files of 8 KiB at most", 'ulimit -f 8; "$@"')
NO_TIME_ZONE = Odd("unknown time zone", variables={"TZ": "Nowhere/Land"})
NARROW = Odd("a terminal of 20 columns", variables={"COLUMNS": "20"})
DUMB = Odd("TERM=dumb", variables={"TERM": "dumb"})
NO_COLOR = Odd("NO_COLOR=1", variables={"NO_COLOR": "1"})
NOHUP = Odd("nohup", 'trap "" HUP INT; "$@"')
BARE = Odd("hardly a variable, as cron has it", 'env -i PYTHONPATH="$PYTHONPATH" "$@"')
PROXY = Odd(
    "a proxy that is not there", variables={"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
)
INTERRUPTED = Odd("Ctrl-C after 0.4 s", 'timeout --preserve-status -s INT 0.4 "$@"')
TERMINATED = Odd("SIGTERM after 2 s", 'timeout --preserve-status -s TERM 2 "$@"')
PRIVATE = Odd("umask 077", 'umask 077; "$@"')

# What takes half a second each.
QUICK = [
    *(Pair("--version", odd, 0, VERSION) for odd in (PLAIN, STDIN_CLOSED, ASCII, WARNINGS, BARE, NO_HOME, OPTIMISED)),
    Pair("--version", STDOUT_CLOSED),
    Pair("--version", STDERR_CLOSED, 0, VERSION),
    Pair("--version", STDOUT_FULL, 4, "this machine cannot: .*No space left"),
    Pair("--version", NO_FOLDER, 0, VERSION),
    *(
        Pair("tasks", odd, 0, "lists the metrics")
        for odd in (PLAIN, STDIN_CLOSED, CP932, C_LOCALE, WARNINGS, HOME_PROC)
    ),
    Pair("tasks", READER_LEFT, 141),
    Pair("tasks", STDOUT_FULL, 4, "this machine cannot: .*No space left"),
    Pair("tasks", NO_FOLDER, 4, "was deleted: change to one that is there"),
    *(Pair("show done", odd, 0, SHOWN) for odd in (PLAIN, ASCII, CP932, EUC_JP, C_LOCALE, NARROW, DUMB, NO_COLOR)),
    *(Pair("show done", odd, 0, SHOWN) for odd in (STDERR_CLOSED, NO_TMP, FEW_FILES, WARNINGS, BARE)),
    Pair("show done", STDOUT_CLOSED, 0, "reading done"),
    Pair("show done", ALL_CLOSED),
    Pair("show done", STDOUT_FULL, 4, "this machine cannot: .*No space left"),
    Pair("show nothing", PLAIN, 2, "there is no folder nothing"),
    Pair("show nothing", STDERR_CLOSED, 2),
    Pair("merge done --out whole", PLAIN, 2, "--shard|part"),
    Pair("run --nope", ASCII, 2, "No such option"),
    Pair("run --nope", STDERR_CLOSED, 2),
]
# What begins a run, and ends it before anything is started.
MISTAKES = [
    Pair('run --adapter ""', PLAIN, 2, "is a variable of the shell empty"),
    Pair("run --out /proc/r", PLAIN, 4, "Expected to use /proc/r"),
    Pair("run --task three.yaml", PLAIN, 2, ""),
    Pair("run --task three.yaml", STDOUT_CLOSED, 2, ""),
    Pair("run --task three.yaml", STDERR_CLOSED, 2),
    Pair("run --task three.yaml", WARNINGS, 2, ""),
    Pair("run", NO_FOLDER, 4, "was deleted"),
    Pair("run", INTERRUPTED, 130, "interrupted"),
    Pair("run --model float64", PLAIN, 2, "save_pretrained"),
    *(Pair(f"run {flag} LONG", PLAIN, 2, "File name too long. Check it") for flag in PLACES),
    *(Pair(f"run {flag} ~nobody/x", PLAIN, 2, "~nobody/x") for flag in PLACES),
    Pair("run --out LONG", PLAIN, 4, "Expected to use xxx.*File name too long"),
    Pair("show LONG", PLAIN, 2, "File name too long. Check it"),
    Pair("swarm LONG", PLAIN, 2, "File name too long. Check it"),
    Pair("swarm ~nobody/x", PLAIN, 2, "~nobody/x"),
    Pair("bootstrap --identity model", PLAIN, 2, "'model' cannot be used: Is a directory"),
    Pair("bootstrap --listen /ip4/127.0.0.1/tcp/PORT", PLAIN, 4, "is taken: another program listens there"),
    Pair("bootstrap --listen /ip4/203.0.113.7/tcp/4001", PLAIN, 4, "cannot listen at /ip4/203.0.113.7"),
    Pair("bootstrap", FEW_FILES, 4, "Too many open files|too many open files"),
    Pair("run", TERMINATED, 143, "ended by SIGTERM"),
]
# What goes all the way over servers of this machine.
RUNS = [
    *(Pair("run", odd, 0, RESULT) for odd in (PLAIN, STDIN_CLOSED, STDERR_CLOSED, ASCII, EUC_JP, C_LOCALE)),
    *(Pair("run", odd, 0, RESULT) for odd in (WARNINGS, OPTIMISED, NO_TMP, LONG_TMP, NO_HOME, SOME_FILES, PRIVATE)),
    *(Pair("run", odd, 0, RESULT) for odd in (NO_TIME_ZONE, NARROW, NOHUP, BARE, PROXY)),
    Pair("run", STDOUT_CLOSED, 0, "retries"),
    Pair("run", ALL_CLOSED),
    Pair("run", STDOUT_FULL, 4, "this machine cannot: .*No space left"),
    Pair("run", READER_LEFT, 141),
    Pair("run", NO_GROWTH, 4, "disk I/O error. The disk failed|may not grow"),
    Pair("run --dry-run", STDIN_CLOSED, 0, ROUTE),
    Pair("run --dry-run", CP932, 0, ROUTE),
    Pair(
        "swarm model --span 0:6 --listen /ip4/127.0.0.1/tcp/PORT", PLAIN, 4, "is taken: another program listens there"
    ),
    Pair("demo", WARNINGS, 0, RESULT),
    Pair("demo", STDIN_CLOSED, 0, RESULT),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, tasks and a run that is done."""
    folder = tmp_path_factory.mktemp("odd")
    paths = demo_paths()
    shutil.copytree(paths.model, folder / "model")
    shutil.copytree(paths.model, folder / "float64")
    config = (paths.model / "config.json").read_text()
    (folder / "float64" / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "float64"'))
    shutil.copytree(paths.prompts, folder / "prompts")
    rows = paths.data.read_text(encoding="utf-8").splitlines()[:20]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    task = paths.task.read_text(encoding="utf-8")
    (folder / "task.yaml").write_text(task)
    (folder / "three.yaml").write_text(task.replace("[bad, good]", "[bad, good, middling]"))
    assert _ended(Pair("run --out done", PLAIN), folder, port=0)[0] == 0
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """A port that another program listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def _ended(pair: Pair, folder: Path, port: int) -> tuple[int, str, str]:
    """Run the pair; return the exit code, stdout and stderr."""
    words = pair.command.replace("PORT", str(port)).replace("LONG", "x" * 300).split()
    if words[0] == "run":
        words = ["run", *GIVEN, *(word.replace('""', "") for word in words[1:])]
    command = ["bash", "-c", pair.odd.shell, "odd", sys.executable, "-m", "petals_eval", *words]
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(temporary), **pair.odd.variables}
    with (folder / "out.txt").open("w+b") as out, (folder / "err.txt").open("w+b") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        finally:
            left = [each for each in psutil.process_iter(["pid"]) if _is_of(process.pid, each)]
            _, alive = psutil.wait_procs(left, timeout=20)
            for each in alive:
                each.kill()
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode("utf-8", "replace"))
    assert alive == [], f"left behind: {[each.cmdline() for each in alive]}"
    ours = [each for each in temporary.iterdir() if not each.name.startswith("torchinductor_")]  # torch's own cache
    assert ours == [], "temporary files are left behind"
    return code, said[0], said[1]


def _is_of(session: int, process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == session
    except ProcessLookupError:
        return False


def _check(pair: Pair, place: Path, port: int) -> None:
    code, out, err = _ended(pair, place, port)
    print(f"{pair.command} | {pair.odd.name} | {code}\n{out}\n--- stderr\n{err}")
    assert code == pair.code
    assert "Traceback" not in out + err and "a bug in petals-eval" not in out + err
    if pair.last:
        lines = ((err if pair.code else out).strip() or err.strip()).splitlines()
        assert lines and re.search(pair.last, lines[-1]), lines[-3:]


@pytest.mark.sample(8)
@pytest.mark.parametrize("pair", QUICK, ids=str)
def test_a_quick_command(pair: Pair, place: Path, port: int) -> None:
    _check(pair, place, port)


@pytest.mark.sample(2)
@pytest.mark.parametrize("pair", MISTAKES, ids=str)
def test_what_cannot_begin(pair: Pair, place: Path, port: int) -> None:
    _check(pair, place, port)


@pytest.mark.sample(1)
@pytest.mark.parametrize("pair", RUNS, ids=str)
def test_a_run(pair: Pair, place: Path, port: int) -> None:
    _check(pair, place, port)


if __name__ == "__main__":
    print("| command | odd condition | exit code | last line |\n|---|---|---|---|")
    for pair in (*QUICK, *MISTAKES, *RUNS):
        print(f"| {pair.command} | {pair.odd.name} | {pair.code} | {pair.last.replace('|', ' or ')} |")

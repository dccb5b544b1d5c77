"""How soon each command says something, and how soon it tells a mistake: medians of ten starts, warm.

    python scripts/bench_first_second.py [--starts 10]

A command's first line must be there within 0.5 s. A mistake that local files can show must end it within 3 s with exit
code 2 or 4, before anything is sent or started: the swarm that the commands name does not exist. Exits with 1 where one
takes longer or ends otherwise. The processor time of each is what it would take on a machine with nothing else to do.
"""

import argparse
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from petals_eval.demo import demo_paths

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWCcXnEqaxyDuSfLLbzKiKiCvEXzPNnmwGcWwZBvwbMmYj"
LINE_SECONDS = 0.5
MISTAKE_SECONDS = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _make_inputs()
        late = False
        print(f"{'first line':<44} {'median':>8} {'slowest':>8} {'processor':>10}")
        for name, arguments in _commands().items():
            late |= _report(name, [_first_line(arguments) for _ in range(starts + 1)], LINE_SECONDS)
        print(f"\n{'mistake':<44} {'median':>8} {'slowest':>8} {'processor':>10}")
        for name, arguments in _mistakes().items():
            late |= _report(name, [_mistake(name, arguments) for _ in range(starts + 1)], MISTAKE_SECONDS)
    return 1 if late else 0


def _make_inputs() -> None:
    """Lay out the demo's files under short names, and one wrong file of each kind."""
    paths = demo_paths()
    shutil.copytree(paths.model, "model")
    shutil.copytree(paths.prompts, "prompts")
    shutil.copytree(paths.prompts, "other/prompts")
    shutil.copy(paths.data, "data.jsonl")
    task = paths.task.read_text(encoding="utf-8")
    Path("task.yaml").write_text(task)
    Path("three.yaml").write_text(task.replace("[bad, good]", "[bad, good, middling]"))
    Path("column.yaml").write_text(task.replace("{text}", "{texts}"))
    Path("key.yaml").write_text(task.replace("max_length", "max_lenght"))
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")


def _run(**changes: str) -> list[str]:
    flags = {"model": "./model", "adapter": "./prompts", "task": "task.yaml", "dht-prefix": "x"} | changes
    given = [part for name, value in flags.items() for part in ((f"--{name}", value) if value else ())]
    return ["run", *given, "--initial-peers", NOBODY]


def _commands() -> dict[str, list[str]]:
    return {
        "--version": ["--version"],
        "--help": ["--help"],
        "run": _run(),
        "run --dry-run": [*_run(), "--dry-run"],
        "demo": ["demo"],
        "swarm": ["swarm", "./model"],
        "bootstrap": ["bootstrap"],
        "merge": ["merge", "a", "b", "--out", "c"],
        "show": ["show", "a"],
        "health": ["health", "--initial-peers", NOBODY],
        "tasks": ["tasks"],
        "tasks --metrics": ["tasks", "--metrics"],
        "bench forward": ["bench", "forward", "--model", "./model", "--local-swarm", "1"],
    }


def _mistakes() -> dict[str, list[str]]:
    return {
        "a flag that there is not": [*_run(), "--limits", "3"],
        "a value that a flag does not take": [*_run(), "--limit", "many"],
        "an address that is none": [*_run(), "--initial-peers", "localhost:31337"],
        "no such model": _run(model="./modell"),
        "no such adapter": _run(adapter="./promts"),
        "an adapter without tensors": _run(adapter="./empty"),
        "two adapters of one name": [*_run(), "--adapter", "./prompts", "./other/prompts"],
        "no such task": _run(task="sst22"),
        "a key that a task does not have": _run(task="key.yaml"),
        "a column that the data does not have": _run(task="column.yaml"),
        "more labels than the head has outputs": _run(task="three.yaml"),
        "no trained head": _run(adapter=""),
        "an output folder that is full": _run(out="full"),
        "an output folder that cannot be made": _run(out="/proc/runs/r"),
        "a metric that there is not": [*_run(), "--fail-under", "acuracy=0.5"],
    }


def _start(arguments: list[str]) -> tuple[subprocess.Popen[bytes], float]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "petals_eval", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    return process, began


def _first_line(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds until a command has written something, and of the processor; it is ended then."""
    process, began = _start(arguments)
    process.stdout.read1(1)
    seconds, times = time.perf_counter() - began, psutil.Process(process.pid).cpu_times()
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return seconds, times.user + times.system


def _mistake(name: str, arguments: list[str]) -> tuple[float, float]:
    """Return the seconds until a command has ended, and of the processor; it must end for a mistake."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process, began = _start(arguments)
    output, _ = process.communicate(timeout=120)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in (2, 4):
        raise SystemExit(f"{name}: expected exit code 2 or 4, found {process.returncode}:\n{output.decode()}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _report(name: str, measured: list[tuple[float, float]], limit: float) -> bool:
    """Print a line about what was measured, but for the first start, and return whether it took too long."""
    seconds, processor = zip(*measured[1:], strict=True)
    median, cost = statistics.median(seconds), statistics.median(processor)
    late = "  TOO LATE" if median > limit else ""
    print(f"{name:<44} {median:>6.2f} s {max(seconds):>6.2f} s {cost:>8.2f} s{late}", flush=True)
    return median > limit


if __name__ == "__main__":
    sys.exit(main())

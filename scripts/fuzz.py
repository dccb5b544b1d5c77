"""Fuzz everything that is decoded from the network and from files; coverage leads (atheris, libFuzzer's mutations).

    pip install atheris
    python scripts/fuzz.py --runs 100000              # every target, so many inputs each
    python scripts/fuzz.py --seconds 60 info record   # these targets, so long each

Each target runs in a process of its own under a limit of time and memory. A finding is an input that raises anything
but the documented error, hangs (--hang seconds), needs more than --megabytes, or makes the reader start a process,
connect or write elsewhere; it is kept in --findings, and the exit code is 1.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from tests.hostile.from_the_network import Target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs of a target at most")
    parser.add_argument("--seconds", type=int, default=0, help="of a target at most; 0: no limit")
    parser.add_argument("--hang", type=int, default=10, help="seconds an input may take")
    parser.add_argument("--megabytes", type=int, default=3000, help="memory of a target's process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "petals-eval-findings")
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    targets = instrumented()
    names = options.targets or list(targets)
    print(f"{'target':16} {'inputs':>10} {'seconds':>8} {'peak MB':>8} {'covered':>8}  found", flush=True)
    total, found_any = 0, False
    for name in names:
        runs, line, finding = in_a_process(name, targets[name], options)
        total += runs
        found_any = found_any or finding is not None
        print(line, flush=True)
    print(f"\n{total:,} inputs over {len(names)} targets")
    return 1 if found_any else 0


def instrumented() -> "dict[str, Target]":
    """The targets, with our own modules and hivemind's small ones reporting where inputs lead."""
    import atheris
    import datasets  # noqa: F401 - these before the instrumentation, which takes long with them
    import hivemind  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["petals_eval"], enable_loader_override=False):
        from tests.hostile import from_files, from_the_network
    logging.disable(logging.CRITICAL)  # a million warnings of an unknown code are not read by anybody
    return {**from_the_network.TARGETS, **from_files.TARGETS}


def in_a_process(name: str, target: "Target", options: argparse.Namespace) -> tuple[int, str, str | None]:
    """Fuzz one target in a fork of this process; inputs, a line of the table, and what was found."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="petals-eval-corpus-") as corpus:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            fuzz(name, target, corpus, options)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        log.seek(0)
        said = log.read().decode(errors="replace")
    runs = max((int(count) for count in re.findall(r"(?m)^(?:#|Done )(\d+)", said)), default=0)
    peak = re.findall(r"peak_rss_mb:\s+(\d+)|rss: (\d+)Mb", said)
    covered = re.findall(r"cov: (\d+)", said)
    finding = None
    if status != 0:
        kept = re.findall(r"Test unit written to (\S+)", said)
        errors = re.findall(r"=== Uncaught Python exception: ===\n(.*)|==\d+== ?ERROR: (.*)", said)
        words = next((a or b for a, b in errors if a or b), f"wait status {status}: {said[-300:]!r}")
        finding = f"{words[:160]} {kept[-1] if kept else ''}"
    memory = "".join(peak[-1]) if peak else "?"
    reached = covered[-1] if covered else "?"
    line = f"{name:16} {runs:>10,} {seconds:>8.0f} {memory:>8} {reached:>8}  {finding or 'nothing'}"
    return runs, line, finding


def fuzz(name: str, target: "Target", corpus: str, options: argparse.Namespace) -> None:
    """Fuzz a target; libFuzzer ends the process."""
    import atheris

    for number, seed in enumerate(target.seeds):
        target.run(seed)  # what is imported late is not a hang of the first input
        (Path(corpus) / f"seed-{number}").write_bytes(seed)
    arguments = [sys.argv[0], corpus, f"-runs={options.runs}", f"-seed={options.seed}", "-print_final_stats=1"]
    arguments += [f"-max_total_time={options.seconds}", f"-timeout={options.hang}", f"-max_len={target.longest}"]
    arguments.append(f"-rss_limit_mb={options.megabytes}")
    arguments.append(f"-artifact_prefix={options.findings}/{name.replace(' ', '-')}-")
    try:
        atheris.Setup(arguments, target.run)
        atheris.Fuzz()
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 0)
    except BaseException:  # noqa: BLE001 - nothing of this process may go on in the parent's place
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

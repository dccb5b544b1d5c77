"""What bench_vs_petals.py and bench_push.py share: a client in a process of its own, and how far two answers agree."""

import contextlib
import json
import math
import os
import signal
import subprocess
from pathlib import Path

from petals_eval.bench.processes import tree

ROOT = Path(__file__).resolve().parents[1]
DHT_PREFIX = "bench"


class Loop:
    """A client in a process of its own: a line of JSON in, a line of JSON out."""

    def __init__(self, python: str, script: Path, environment: dict[str, str], log: Path):
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,
                text=True,
            )

    def ask(self, **settings: object) -> dict:
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[1]} ended. Its log ends:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    def processes(self) -> list[int]:
        return tree(self._process.pid)

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


def agree(ours: dict, theirs: dict) -> dict:
    """On how many rows two answers differ, and by how much in a probability at most."""
    different = sum(map(int.__ne__, ours["predictions"], theirs["predictions"]))
    pairs = zip(ours["probabilities"], theirs.get("probabilities") or map(softmax, theirs["logits"]), strict=True)
    largest = max(abs(one - other) for row, other_row in pairs for one, other in zip(row, other_row, strict=True))
    return {"different": different, "largest_difference": largest, "classes": len(set(ours["predictions"]))}


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(each - max(logits)) for each in logits]
    return [each / sum(powers) for each in powers]

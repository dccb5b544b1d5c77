"""Show that the client's memory does not grow with the number of examples.

    python scripts/bench_memory.py --rows 100000

Short rows are written to a csv in a temporary folder and evaluated with the demo's model and prompts over a local swarm
whose servers are processes of their own, so that what is measured is the client: this process (its RSS, and the part
of it that is not pages of mapped files), and its libp2p daemons. The level after the first 2,000 rows (imports done,
pools filled, one window of batches seen) is the base. The evaluation itself and the metrics at its end are told apart:
metrics are computed from arrays of all predictions, so some bytes a row there are the price of having metrics.

Ends with 1 when memory grows by more than --limit megabytes while rows are evaluated.
"""

import argparse
import csv
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BASE_ROWS = 2_000
VOCABULARY = "the soup was good bad sad nice weak and but they never call it fresh bread on monday we liked owner"


@dataclass(frozen=True)
class Sample:
    """Megabytes of this process and of its daemons when `rows` rows were done."""

    seconds: float
    rows: int
    rss: float
    anonymous: float
    daemons: float


class Sampler:
    """Takes a sample every `period` seconds in a thread of its own; also the evaluation's progress."""

    def __init__(self, period: float):
        self.samples: list[Sample] = []
        self.rows = 0
        self.retries = 0
        self._period = period
        self._started = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def update(self, done: int, retries: int = 0, servers: int = 0, message: str | None = None) -> None:
        self.rows, self.retries = done, retries

    def waiting(self, message: str) -> None:
        print(f"waiting: {message}", file=sys.stderr)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._period):
            self.take()

    def take(self) -> None:
        rss, anonymous = memory("self")
        daemons = sum(memory(pid)[0] for pid in own_daemons())
        self.samples.append(Sample(time.monotonic() - self._started, self.rows, rss, anonymous, daemons))


def memory(process: int | str) -> tuple[float, float]:
    """Megabytes a process has in memory, and how many of them are no pages of mapped files; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def own_daemons() -> list[int]:
    """Process ids of the libp2p daemons that this process started itself; those of servers are not among them."""
    found: list[int] = []
    for tasks in Path("/proc/self/task").iterdir():
        try:
            children = (tasks / "children").read_text().split()
            found += [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "p2pd"]
        except OSError:
            continue  # a thread or a process that has just ended
    return found


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    words = VOCABULARY.split()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            writer.writerow([" ".join(rng.choices(words, k=rng.randint(3, 9))), rng.choice(["bad", "good"])])


def table(samples: list[Sample], base: Sample, lines: int) -> None:
    print(f"{'rows':>9} {'seconds':>8} {'RSS MB':>8} {'anonymous':>10} {'above base':>11} {'daemons':>8}")
    step = max(1, len(samples) // lines)
    shown = samples[::step] + ([samples[-1]] if (len(samples) - 1) % step else [])
    for one in shown:
        above = one.rss - base.rss
        print(
            f"{one.rows:>9,} {one.seconds:>8.1f} {one.rss:>8.1f} {one.anonymous:>10.1f} {above:>+11.1f} "
            f"{one.daemons:>8.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--window", type=int, default=8, help="micro-batches in flight")
    parser.add_argument("--limit", type=float, default=16.0, help="megabytes of growth that are too much")
    parser.add_argument("--lines", type=int, default=25, help="lines of the table")
    options = parser.parse_args()
    if options.rows < 2 * BASE_ROWS:
        parser.error(f"expected at least {2 * BASE_ROWS} rows, found {options.rows}")

    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "datasets")  # before datasets is imported
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        data = Path(folder) / "rows.csv"
        write_rows(data, options.rows)
        return measure(options, data, Path(folder) / "run")


def measure(options: argparse.Namespace, data: Path, out: Path) -> int:
    import torch

    import petals_eval
    from petals_eval.demo import demo_paths
    from petals_eval.local_swarm import LocalSwarm

    torch.set_num_threads(1)
    demo = demo_paths()
    with (
        LocalSwarm(demo.model, servers=options.servers, mode="process") as swarm,
        petals_eval.RemoteModel.from_pretrained(
            str(demo.model),
            adapter=str(demo.prompts),
            initial_peers=swarm.initial_peers,
            dht_prefix=swarm.dht_prefix,
            window=options.window,
        ) as model,
        Sampler(0.25) as sampler,
    ):
        started = time.monotonic()
        petals_eval.evaluate(model, task=str(demo.task), data=str(data), out=out, progress=sampler)
        seconds = time.monotonic() - started
        sampler.take()

    during = [one for one in sampler.samples if BASE_ROWS <= one.rows < options.rows]
    after = [one for one in sampler.samples if one.rows >= options.rows]
    base, last = during[0], during[-1]
    highest = max(during, key=lambda one: one.rss)
    table(during, base, options.lines)
    peak = max(after, key=lambda one: one.rss)
    print(f"metrics at the end: at most {peak.rss:.1f} MB ({peak.rss - last.rss:+.1f} MB)")
    growth = last.rss - base.rss
    print(
        f"{options.rows:,} rows in {seconds:.0f} s, {sampler.retries} retries: from {base.rss:.1f} MB after "
        f"{base.rows:,} rows to {last.rss:.1f} MB after {last.rows:,}; growth {growth:+.1f} MB "
        f"({growth * 2**20 / (last.rows - base.rows):+.1f} bytes a row), highest {highest.rss - base.rss:+.1f} MB, "
        f"anonymous {last.anonymous - base.anonymous:+.1f} MB, daemons {last.daemons - base.daemons:+.1f} MB"
    )
    return int(growth > options.limit)


if __name__ == "__main__":
    sys.exit(main())

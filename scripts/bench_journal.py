#!/usr/bin/env python
"""What the journal costs a run: the time spent in it, as a share of the run's time.

    scripts/bench_journal.py --model MODEL --adapter PROMPTS --task trec --data FILE [--repeat 3]

Every call of the journal is timed while the rows are evaluated over an embedded swarm whose servers are processes.
Commits wait for the disk, and that waiting counts; so does the time in which other threads of the client, or other
processes of a busy machine, have the processor meanwhile. The processor time of the calls alone is shown beside it.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import petals_eval
from petals_eval.runs import Journal, RunFolder

METHODS = ("add", "add_failure", "withdraw", "flush", "flush_if_due", "done_keys", "counts", "arrays", "servers")


class Clock:
    """Time inside the journal. A method that calls another one is counted once."""

    def __init__(self) -> None:
        self.inside = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.processor = 0.0

    def watch(self, name: str) -> None:
        real = getattr(Journal, name)

        def timed(journal: Journal, *arguments: object, **options: object) -> object:
            self.inside += 1
            started, processor = time.perf_counter(), time.thread_time()
            try:
                return real(journal, *arguments, **options)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.seconds[name] += time.perf_counter() - started
                    self.calls[name] += 1
                    self.processor += time.thread_time() - processor

        setattr(Journal, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", help="where the run folders go: the disk that is measured")
    given = parser.parse_args()
    clock = Clock()
    for name in METHODS:
        clock.watch(name)
    shares, processor = [], []
    with (
        tempfile.TemporaryDirectory(dir=given.out) as folder,
        petals_eval.LocalSwarm(given.model, servers=given.servers) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            given.model, adapter=given.adapter, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        ) as model,
    ):
        for repeat in range(given.repeat):
            clock.seconds.clear()
            clock.calls.clear()
            clock.processor = 0.0
            out = Path(folder) / str(repeat)
            petals_eval.evaluate(model, task=given.task, data=given.data, limit=given.limit, out=out)
            with RunFolder.open(out) as opened:
                adapter = opened.manifest.adapters[0].name
                rows, seconds = opened.journal.counts(adapter).scored, opened.journal.seconds(adapter)
            spent = sum(clock.seconds.values())
            shares.append(spent / seconds)
            processor.append(clock.processor / seconds)
            print(
                f"{rows:,} rows in {seconds:.2f} s ({rows / seconds:,.0f} ex/s); in the journal {1000 * spent:.0f} ms, "
                f"{1e6 * spent / rows:.1f} us a row: {100 * spent / seconds:.2f}% of the run's time, "
                f"{100 * clock.processor / seconds:.2f}% of it processor time"
            )
    for name in sorted(clock.seconds, key=lambda name: -clock.seconds[name]):
        print(f"  {name:<13} {clock.calls[name]:>7,} calls  {1000 * clock.seconds[name]:>7.1f} ms")
    print(
        f"median: {100 * statistics.median(shares):.2f}% of the run's time, "
        f"{100 * statistics.median(processor):.2f}% of it processor time"
    )


if __name__ == "__main__":
    main()

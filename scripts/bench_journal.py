#!/usr/bin/env python
"""What the journal costs a run: the same run with one journal and with two, in turn.

    scripts/bench_journal.py --model MODEL --adapter PROMPTS --task trec --data FILE [--pairs 10]

The second journal, in a file beside the first one, is given the same rows and asked for all that metrics are made from;
what a run takes longer with it is what a journal costs: processor time, waiting for the disk, and whatever that holds
up. (Reading the predictions back for predictions.jsonl is that file's cost, with or without a journal.) The time
inside the first one's calls is shown beside it. That is more: while a call waits for the disk or for its turn, the
client's other threads and the servers on the same machine go on.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import petals_eval
from petals_eval.runs import Journal

METHODS = ("add", "add_failure", "withdraw", "flush", "flush_if_due", "done_keys", "counts", "scored_rows", "servers")


class Watch:
    """Time inside the journal's calls, and each of them a second time on `second`, where there is one. A call from
    within another one is neither."""

    def __init__(self) -> None:
        self.second: Journal | None = None
        self.seconds = 0.0
        self._is_inside = False
        for name in METHODS:
            setattr(Journal, name, self._watched(getattr(Journal, name)))

    def _watched(self, real: Callable[..., object]) -> Callable[..., object]:
        def watched(journal: Journal, *arguments: object, **options: object) -> object:
            if self._is_inside:
                return real(journal, *arguments, **options)
            self._is_inside = True
            try:
                if self.second is not None:
                    real(self.second, *arguments, **options)
                started = time.perf_counter()
                try:
                    return real(journal, *arguments, **options)
                finally:
                    self.seconds += time.perf_counter() - started
            finally:
                self._is_inside = False

        return watched

    @contextlib.contextmanager
    def doubled(self, path: Path) -> Iterator[None]:
        with Journal(path, create=True) as second, second.session("second"):
            self.second = second
            try:
                yield
            finally:
                self.second = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", help="where the run folders go: the disk that is measured")
    given = parser.parse_args()
    watch = Watch()
    with (
        tempfile.TemporaryDirectory(dir=given.out) as folder,
        petals_eval.LocalSwarm(given.model, servers=given.servers) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            given.model, adapter=given.adapter, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        ) as model,
    ):

        def run(name: str, *, doubled: bool) -> tuple[float, float]:
            """Seconds of the whole evaluation, and of those in the journal."""
            watch.seconds, started = 0.0, time.perf_counter()
            out = Path(folder) / name
            with watch.doubled(Path(folder) / f"{name}.sqlite") if doubled else contextlib.nullcontext():
                petals_eval.evaluate(model, task=given.task, data=given.data, limit=given.limit, out=out)
            return time.perf_counter() - started, watch.seconds

        run("warm", doubled=False)
        costs, shares = [], []
        for pair in range(given.pairs):
            taken = {}
            for doubled in (False, True) if pair % 2 else (True, False):
                taken[doubled], inside = run(f"{pair} {doubled}", doubled=doubled)
                if not doubled:
                    shares.append(inside / taken[doubled])
            costs.append(taken[True] / taken[False] - 1)
            print(
                f"one journal {taken[False]:.2f} s, two {taken[True]:.2f} s: {costs[-1]:+.1%} of the run's time; "
                f"inside the one {shares[-1]:.1%}",
                flush=True,
            )
    low, _, high = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
    print(
        f"median: {statistics.median(costs):+.1%} of the run's time (middle half {low:+.1%} to {high:+.1%}); "
        f"inside its calls {statistics.median(shares):.1%}"
    )


if __name__ == "__main__":
    main()

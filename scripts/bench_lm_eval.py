"""Time the backend of lm-evaluation-harness against Petals' own client and against our own run: a task of choices.

    scripts/petals_peer.sh                                     # once: an environment with Petals
    .venv/bin/python scripts/bench_lm_eval.py --json lm-eval.json

Real Petals servers stand behind links of 20 ms and 100 Mbit/s, as for scripts/bench_vs_petals.py. Petals' client sends
the same requests one batch after the other, at the batch size that is fastest here. The three take turns on the same
servers, and what is predicted must agree on every row. The backend is to reach the ratio of our own run, less 10%.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench_loops import agree
from bench_vs_petals import finish, running
from bench_workloads import Workloads

from petals_eval.bench.statistics import Spread
from tests.interop.server_kinds import PETALS

SHARE = 0.9  # of the ratio that our own run reaches


def compare(folder: Path, rounds: int, limit: int | None, batch_sizes: list[int] | None) -> dict:
    workload = Workloads(folder).make("choice")
    with running(workload, folder, limit) as (bench, ours, petals, data):
        rows = len(data["labels"])
        some = {key: values[: workload.sweep_rows] for key, values in data.items()}
        sweep = {}
        for size in batch_sizes or workload.batch_sizes:
            found = bench.run("petals, sweep", petals, len(some["labels"]), **some, batch_size=size)
            sweep[size] = found["rows_per_second"]
            print(f"  Petals' client at batch size {size}: {sweep[size]:.1f} rows/s")
        best = max(sweep, key=lambda size: sweep[size])
        for what in ("evaluate", "lm_eval"):
            bench.run(f"{what}, warm-up", ours, rows, what=what)
        ratios: dict[str, list[float]] = {"run": [], "lm-eval": []}
        agreement = []
        turns = [
            ("run", ours, {"what": "evaluate"}),
            ("lm-eval", ours, {"what": "lm_eval"}),
            ("petals", petals, {**data, "batch_size": best}),
        ]
        for number in range(rounds):
            first = number % len(turns)  # nobody always goes first
            found = {side: bench.run(side, loop, rows, **told) for side, loop, told in turns[first:] + turns[:first]}
            for side, its_ratios in ratios.items():
                its_ratios.append(found["petals"]["seconds"] / found[side]["seconds"])
                agreement.append(agree(found[side]["answer"], found["petals"]["answer"]))
            print(
                f"{number + 1:3}.", ", ".join(f"{side} {each['seconds']:.2f} s" for side, each in found.items()), end=""
            )
            print(f"; ratios {ratios['run'][-1]:.2f} and {ratios['lm-eval'][-1]:.2f}")
        for side, its_ratios in ratios.items():
            print(f"ratio of {side} to Petals: {Spread.of(its_ratios)}")
        shares = [one / other for one, other in zip(ratios["lm-eval"], ratios["run"], strict=True)]
        print(f"lm-eval to run: {Spread.of(shares)}")
        return {
            "rows": rows,
            "best_batch_size": best,
            "sweep": sweep,
            "ratios": ratios,
            "share_of_run": Spread.of(shares).median,
            "agreement": agreement,
            "runs": bench.runs,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each takes its turn (default: 3)")
    parser.add_argument("--rows", type=int, help="only so many of the 1,000 rows (for a try)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="batch sizes Petals' client is tried with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    arguments = parser.parse_args()
    if not PETALS.is_there:
        print(PETALS.not_there, file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory(prefix="bench-lm-eval-") as folder:
        result = compare(Path(folder), arguments.rounds, arguments.rows, arguments.batch_sizes)
    if result["share_of_run"] < SHARE:
        print(f"error: expected {SHARE:.0%} of the run's ratio at least", file=sys.stderr)
    return finish("lm-eval", result, arguments.json) or int(result["share_of_run"] < SHARE)


if __name__ == "__main__":
    sys.exit(main())

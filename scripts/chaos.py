"""Run seeded schedules of faults over runs on a local swarm, and print what came of each.

    python scripts/chaos.py --schedules 200 --seed 0

Ends with 1 when a run was lost, doubled or other than the quiet one, with 0 otherwise. --seconds ends it early, after
the schedule under way; the next piece goes on with --seed.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.chaos.schedules import Chaos, Outcome  # noqa: E402

HEADS = f"{'seed':>5} {'seconds':>7} {'retries':>7}  {'faults':46} {'ended':44} result"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200, help="how many, one a seed")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--jobs", type=int, default=1, help="swarms at once, each with a share of the seeds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further schedule after so many")
    default = os.environ.get("PETALS_EVAL_REALDATA", str(ROOT.parent / "shared" / "realdata"))
    parser.add_argument("--realdata", type=Path, default=Path(default), help="folder of weights, prompts and data")
    options = parser.parse_args()
    started = time.monotonic()
    print(HEADS)
    seeds = range(options.seed, options.seed + options.schedules)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, seeds[job :: options.jobs], options.seconds, options.realdata)
            for job in range(options.jobs)
        ]
        outcomes = [outcome for job in jobs for outcome in job.result()]
    failed = sum(bool(outcome.wrong) for outcome in outcomes)
    drawn_again = sum(outcome.attempts - 1 for outcome in outcomes)
    hit: Counter[str] = Counter()
    for outcome in outcomes:
        for name, calls in outcome.in_flight.items():
            hit[name.partition("@")[0]] += calls
    ran = sorted(outcome.planned.seed for outcome in outcomes)
    print(f"\n{len(ran)} schedules, seeds {ran[0]} to {ran[-1]}: {len(ran) - failed} as they must be, {failed} not; ")
    print(f"{drawn_again} drawn again because a fault met no call; {time.monotonic() - started:.0f} s")
    print("calls under way that were hit: " + ", ".join(f"{name} {hit[name]}" for name in sorted(hit)))
    return 1 if failed else 0


def run(seeds: Sequence[int], seconds: float, realdata: Path) -> list[Outcome]:
    """Run the schedules of these seeds one after the other, and print a line for each."""
    give_up = time.monotonic() + seconds
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="petals-eval-chaos-") as folder, Chaos(realdata, Path(folder)) as chaos:
        for seed in seeds:
            if time.monotonic() > give_up:
                break
            outcome = chaos.run(seed)
            outcomes.append(outcome)
            names = ("nobody: " if outcome.planned.nobody else "") + outcome.planned.names
            said = outcome.ended.partition("\n")[0][:40] + (f" {outcome.caught}" if outcome.caught else "")
            result = "; ".join(outcome.wrong) or "as the quiet run"
            print(f"{seed:>5} {outcome.seconds:>7.1f} {outcome.retries:>7}  {names:46} {said:44} {result}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())

"""Hold the predictions that a run calls unsure against those that really change, over many runs of a real model.

For each case all rows of TREC's training set are computed twice, in both ways that the case is about. Then runs of some
of them, drawn by seeds, are evaluated as ever, and what each says of its numerical noise is held against how many of
its predictions differ between the two ways. 19 of 20 runs should call at least as many unsure as change, and at most
five times their mean over all runs, or three.

    scripts/noise_coverage.py [--seeds 20] [--rows N] [--cases bfloat16 tf32 float16-wire] [--realdata FOLDER]

Ends with 1 where one of the cases does not hold.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import petals_eval
from petals_eval.local_swarm import LocalSwarm
from petals_eval.runs import AdapterResult
from petals_eval.tasks import load_task, resolve_source

BLOCKS = (0, 5)  # of the model in realdata
TOKENS = 2048  # a micro-batch


@dataclass(frozen=True)
class Case:
    """Two ways to compute. servers: options of each; one alone is used with and without the wire.

    rows: of a run; more where few predictions change, of which a mean says little.
    """

    servers: tuple[Mapping[str, Any], ...]
    wire: str | None = None
    rows: int = 1000


CASES = {
    "bfloat16": Case(({"dtype": "bfloat16"}, {"dtype": "bfloat16", "arithmetic": "fused"})),
    "tf32": Case(({}, {"arithmetic": "tf32"}), rows=3000),
    "float16-wire": Case(({},), wire="float16"),
}


@contextlib.contextmanager
def swarm_of(realdata: Path, servers: tuple[Mapping[str, Any], ...]) -> Iterator[LocalSwarm]:
    with LocalSwarm(realdata / "stories260K-hf", spans=[BLOCKS], mode="thread", **servers[0]) as swarm:
        for options in servers[1:]:
            swarm.add_server(BLOCKS, **options)
        yield swarm


def evaluated(realdata: Path, swarm: LocalSwarm, wire: str | None, **options: Any) -> AdapterResult:
    with petals_eval.RemoteModel.from_pretrained(
        realdata / "stories260K-hf",
        adapter=realdata / "adapters" / "trec-deep_ptune",
        initial_peers=swarm.initial_peers,
        dht_prefix=swarm.dht_prefix,
        wire=wire,
    ) as model:
        task = load_task("trec")
        source = resolve_source(task, realdata / "trec" / "TREC.train.all")
        return petals_eval.evaluate(model, task=task, data=source, tokens_per_micro_batch=TOKENS, **options).first


def changing(realdata: Path, case: Case) -> dict[str, bool]:
    """Return of each row, by its key, whether its prediction is another one in the other way."""
    both = []
    ways = (
        [(each, None) for each in case.servers]
        if case.wire is None
        else [(case.servers[0], case.wire), (case.servers[0], None)]
    )
    for options, wire in ways:
        with swarm_of(realdata, (options,)) as swarm:
            found = evaluated(realdata, swarm, wire, no_noise=True)
        both.append({each.key: each.prediction for each in found.predictions})
    return {key: both[0][key] != both[1][key] for key in both[0]}


def held(realdata: Path, name: str, seeds: int, rows: int | None) -> bool:
    """Evaluate the runs of a case, print what came of them, and return whether they hold."""
    case = CASES[name]
    rows = rows or case.rows
    changes = changing(realdata, case)
    changed, unsure, by_largest = [], [], []
    with swarm_of(realdata, case.servers) as swarm:
        for seed in range(seeds):
            found = evaluated(realdata, swarm, case.wire, limit=rows, seed=seed)
            noise = found.noise
            if noise is None or noise.unsure is None:
                raise SystemExit(f"{name}, seed {seed}: nothing was measured: {noise}")
            changed.append(sum(changes[each.key] for each in found.predictions))
            unsure.append(noise.unsure)
            largest = max(each.largest for each in noise.recomputed)
            ordered = np.sort([each.scores for each in found.predictions], axis=1)
            by_largest.append(int((ordered[:, -1] - ordered[:, -2] < largest).sum()))
    most = max(5 * float(np.mean(changed)), 3.0)
    enough = sum(told >= came for told, came in zip(unsure, changed, strict=True))
    not_too_many = sum(told <= most for told in unsure)
    print(
        f"| {name} | {rows} | {np.mean(changed):.1f} | {np.mean(unsure):.1f} | {enough} of {seeds} | "
        f"{not_too_many} of {seeds} | {np.mean(by_largest):.1f} |",
        flush=True,
    )
    return min(enough, not_too_many) >= 0.95 * seeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rows", type=int, help="of each run, if not those of the case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    default = os.environ.get("PETALS_EVAL_REALDATA", Path(__file__).resolve().parents[2] / "shared" / "realdata")
    parser.add_argument("--realdata", type=Path, default=Path(default))
    given = parser.parse_args()
    print(
        "| case | rows | changed | called unsure | at least as many | at most 5 x mean, or 3 | by the largest change |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    held_all = [held(given.realdata, name, given.seeds, given.rows) for name in given.cases]
    return 0 if all(held_all) else 1


if __name__ == "__main__":
    sys.exit(main())

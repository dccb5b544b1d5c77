"""Time evaluations in lanes against the same by forward calls: what rows have in common once, or with every row.

    .venv/bin/python scripts/bench_lanes.py few-shot --rows 600 --json lanes.json
    .venv/bin/python scripts/bench_lanes.py                    # all workloads

Pairs are interleaved, on one local swarm behind an emulated network (petals_eval/local_swarm/network.py), each side on
a connection of its own. Of each workload: how many times as long forward calls take (`ratio`), and the bytes that leave
the client in lanes, as a share of those of forward calls (`bytes_up_share`); medians. `petals_ratio`, against Petals'
own loop, is null: it takes servers of the development line, and these are the local swarm's. Predictions must agree on
every row.
"""

import argparse
import contextlib
import json
import os
import random
import string
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_loops import DHT_PREFIX, Loop, agree  # noqa: E402
from bench_workloads import HOME, Workloads, make_llama, make_task  # noqa: E402

from petals_eval.bench.statistics import Spread  # noqa: E402
from petals_eval.local_swarm import LocalSwarm  # noqa: E402
from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile  # noqa: E402

NEAR = LinkProfile(delay=0.02)
FOUR = ((0, 1), (1, 2), (2, 3), (3, 4))


@dataclass(frozen=True)
class LaneWorkload:
    """What is evaluated, and over what.

    link: of each server. client_mbps: up and down of the client's own link, which all share. cache: tokens of each
    server's cache. pace: tokens a second of servers that wait and compute nothing; None: they compute. settings: of the
    lanes' side, beside `lanes`.
    """

    model: Path
    adapter: Path | None
    task: str
    data: Path
    spans: tuple[tuple[int, int], ...]
    link: LinkProfile | None = HOME
    client_mbps: tuple[float | None, float | None] = (None, None)
    cache: int = 1 << 14
    pace: float | None = None
    settings: dict = field(default_factory=dict)


def few_shot(folder: Path, **changes: object) -> LaneWorkload:
    """400 tokens that all rows begin with, and up to 24 of their own."""
    model, adapter = make_llama(folder / "few", hidden=256, blocks=4)
    task = make_task(folder / "few-letters", rows=6000, tokens=(24, 24), in_front=400)
    whole = {"cache": 1 << 16, "settings": {"cache_share": 1.0}, "pace": 20_000.0}
    return LaneWorkload(model, adapter, *task, spans=FOUR, **{**whole, **changes})


def few_shot_small(folder: Path) -> LaneWorkload:
    """The same on caches of 16,384 tokens, of which lanes take the default share."""
    return few_shot(folder, cache=1 << 14, settings={})


def trec(folder: Path) -> LaneWorkload:
    """Real weights with 8 deep prompts over a narrow uplink."""
    real = Workloads(folder).realdata
    adapter, data = real / "adapters" / "trec-deep_ptune", real / "trec" / "TREC.test.all"
    spans = ((0, 2), (2, 4), (4, 5))
    return LaneWorkload(real / "stories260K-hf", adapter, "trec", data, spans, NEAR, (20.0, 100.0))


def wide(folder: Path) -> LaneWorkload:
    """Hidden states of 1,024 values and 8 deep prompts over the same uplink."""
    model, adapter = make_llama(folder / "wide", hidden=1024, deep=True)
    task = make_task(folder / "wide-letters", rows=200, tokens=(8, 24))
    return LaneWorkload(model, adapter, *task, ((0, 2), (2, 4), (4, 6), (6, 8)), NEAR, (20.0, 100.0))


def choices(folder: Path) -> LaneWorkload:
    """Four endings of 12 tokens for each context of 96, over a narrow link."""
    model, _ = make_llama(folder / "choices", hidden=256, blocks=4)
    draw, lines = random.Random(0), []
    for row in range(200):
        endings = ["".join(draw.choices(string.ascii_lowercase, k=12)) for _ in range(4)]
        context = "".join(draw.choices(string.ascii_lowercase, k=95))  # and the token that is put in front
        lines.append(json.dumps({"start": context, "endings": endings, "label": row % 4}))
    data, task = folder / "endings.jsonl", folder / "endings.yaml"
    data.write_text("\n".join(lines) + "\n")
    task.write_text(
        'kind: choice\nname: endings\ntext: "{start}"\nchoices_column: endings\nlabel_column: label\nmetrics: [acc]\n'
    )
    return LaneWorkload(model, None, str(task), data, ((0, 2), (2, 4)), NEAR, (10.0, 50.0))


def ptune(folder: Path) -> LaneWorkload:
    """16 tuned prompts, and no network."""
    model, adapter = make_llama(folder / "near", hidden=256, blocks=4, prefix=16)
    task = make_task(folder / "near-letters", rows=600, tokens=(16, 48))
    return LaneWorkload(model, adapter, *task, spans=((0, 2), (2, 4)), link=None)


WORKLOADS: dict[str, Callable[[Path], LaneWorkload]] = {
    "few-shot": few_shot,
    "few-shot-small": few_shot_small,
    "trec": trec,
    "wide": wide,
    "choices": choices,
    "ptune": ptune,
}


@contextlib.contextmanager
def running(workload: LaneWorkload, folder: Path) -> Iterator[tuple[EmulatedNetwork, Loop]]:
    """The network and our client, which knows model and swarm."""
    up, down = workload.client_mbps
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(EmulatedNetwork(client_up_mbps=up, client_down_mbps=down))
        swarm = LocalSwarm(
            workload.model,
            spans=workload.spans,
            dht_prefix=DHT_PREFIX,
            network=network,
            links=workload.link or LinkProfile(),
            attn_cache_tokens=workload.cache,
            pace=workload.pace,
        )
        stack.enter_context(swarm)
        environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        ours = Loop(sys.executable, ROOT / "scripts" / "evaluation_loop.py", environment, folder / "ours.log")
        stack.enter_context(ours)
        ours.ask(
            model=str(workload.model),
            adapter=None if workload.adapter is None else str(workload.adapter),
            initial_peers=swarm.initial_peers,
            dht_prefix=DHT_PREFIX,
            task=workload.task,
            data=str(workload.data),
            limit=1,
            what="rows",
            no_noise=True,
        )
        yield network, ours


def measure(workload: LaneWorkload, folder: Path, pairs: int, rows: int | None, lanes: str) -> dict:
    """Interleaved pairs of `lanes` and never."""
    runs, ratios, shares, agreement = [], [], [], []
    with running(workload, folder) as (network, ours):

        def run(way: str, limit: int | None) -> dict:
            settings = {"lanes": way, **(workload.settings if way != "never" else {})}
            before = network.use()[1]
            answer = ours.ask(what="evaluate", swarm=settings, limit=limit)
            sent = network.use()[1].since(before)
            record = {
                "lanes": way,
                "seconds": answer["seconds"],
                "bytes_up": sent.bytes_up,
                "retries": answer["retries"],
            }
            runs.append(record | {"accuracy": answer["accuracy"], "rows": len(answer["predictions"])})
            print(
                f"     lanes {way:7} {answer['seconds']:7.2f} s; {sent.bytes_up / 1e6:7.2f} MB up; "
                f"{answer['retries']} retries",
                flush=True,
            )
            return answer | record

        for way in (lanes, "never"):  # connected, and every server asked what it is
            run(way, 8)
        for pair in range(pairs):
            answers = {way: run(way, rows) for way in (lanes, "never")[:: -1 if pair % 2 else 1]}
            laned, plain = answers[lanes], answers["never"]
            ratios.append(plain["seconds"] / laned["seconds"])
            shares.append(laned["bytes_up"] / plain["bytes_up"])
            agreement.append(agree(laned, plain))
            print(
                f"{pair + 1:3}. ratio {ratios[-1]:.2f}, {shares[-1]:.0%} of the bytes up; "
                f"{agreement[-1]['different']} predictions differ",
                flush=True,
            )
    return {
        "ratio": Spread.of(ratios).median,
        "petals_ratio": None,
        "bytes_up_share": Spread.of(shares).median,
        "ratios": ratios,
        "agreement": agreement,
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs (default: 3)")
    parser.add_argument("--rows", type=int, help="only so many of a workload's rows (for a try)")
    parser.add_argument("--lanes", choices=["always", "auto"], default="always", help="the way that is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"expected workloads of {', '.join(WORKLOADS)}, found {', '.join(unknown)}")
    found = {}
    for name in given.workloads or WORKLOADS:
        with tempfile.TemporaryDirectory(prefix="bench-lanes-") as folder:
            print(f"{name}:", flush=True)
            found[name] = measure(WORKLOADS[name](Path(folder)), Path(folder), given.pairs, given.rows, given.lanes)
        print(f"  ratio {found[name]['ratio']:.2f}, {found[name]['bytes_up_share']:.0%} of the bytes up", flush=True)
        if given.json:
            given.json.write_text(json.dumps(found | {"processors": os.cpu_count()}, indent=2) + "\n")
    different = sum(each["different"] for result in found.values() for each in result["agreement"])
    if different:
        print(f"error: {different} predictions differ", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

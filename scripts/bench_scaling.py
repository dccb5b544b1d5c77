"""How the time of an evaluation grows with examples, servers and sequence length, on a local swarm behind home links.

    .venv/bin/python scripts/bench_scaling.py --json scaling.json --plot scaling

A random Llama of 8 small blocks; each run is petals_eval.evaluate from raw text to metrics, on a warm connection. Every
point is told with its spread. Servers, relays and client share this machine's processors: with more servers than
processors it is these that grow scarce.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HIVEMIND_LOGLEVEL"] = "ERROR"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # bench_workloads makes models as the tests do

from bench_workloads import make_llama, make_task  # noqa: E402

import petals_eval  # noqa: E402
from petals_eval.bench.floor import link_seconds, pass_seconds  # noqa: E402
from petals_eval.bench.plot import line_plot  # noqa: E402
from petals_eval.bench.statistics import Spread  # noqa: E402
from petals_eval.local_swarm import LocalSwarm  # noqa: E402
from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile  # noqa: E402
from petals_eval.remote_model import RemoteModel  # noqa: E402

BLOCKS, HIDDEN = 8, 128


@dataclass(frozen=True)
class Case:
    """One evaluation: `examples` texts of `length` tokens over `servers` servers."""

    examples: int
    servers: int
    length: int


def measure(cases: Iterable[Case], link: LinkProfile, repeats: int, folder: Path) -> dict[Case, dict]:
    """Every case on a swarm of as many servers: seconds of each run, and how busy the busiest link was."""
    model_folder, adapter = make_llama(folder / "llama", hidden=HIDDEN, blocks=BLOCKS)
    found = {}
    for servers, some in groupby(sorted(set(cases), key=lambda case: case.servers), lambda case: case.servers):
        with (
            EmulatedNetwork() as network,
            LocalSwarm(model_folder, servers=servers, network=network, links=link) as swarm,
            RemoteModel.from_pretrained(
                str(model_folder),
                adapter=str(adapter),
                initial_peers=swarm.initial_peers,
                dht_prefix=swarm.dht_prefix,
            ) as model,
        ):
            for case in some:
                found[case] = record = time_case(model, network, case, repeats, folder)
                record["one_pass"] = pass_seconds([link] * servers)
                print(
                    f"  {case.examples} examples, {servers} servers, {case.length} tokens: {shown(record)}", flush=True
                )
    return found


def time_case(model: RemoteModel, network: EmulatedNetwork, case: Case, repeats: int, folder: Path) -> dict:
    task, data = make_task(
        folder / f"letters-{case.examples}-{case.length}", rows=case.examples, tokens=(case.length, case.length)
    )
    petals_eval.evaluate(model, task=task, data=data, limit=min(case.examples, 100))  # connections, first calls
    seconds, busy = [], []
    for _ in range(repeats):
        before, _ = network.use()
        started = time.perf_counter()
        petals_eval.evaluate(model, task=task, data=data)
        seconds.append(time.perf_counter() - started)
        after, _ = network.use()
        busy.append(link_seconds(after) - link_seconds(before))
    return {"seconds": seconds, "busiest_link": busy}


def shown(record: dict) -> str:
    use = max(busy / seconds for busy, seconds in zip(record["busiest_link"], record["seconds"], strict=True))
    return f"{Spread.of(record['seconds'])} s, busiest link {use:.0%} full"


def say_series(name: str, cases: list[Case], found: dict[Case, dict]) -> list[tuple[float, float]]:
    """Print how the median time grows along one dimension; returns its points."""
    print(f"\n{name:>10} {'seconds: median (least to greatest)':>36} {'examples/s':>11} {'tokens/s':>10}")
    points = []
    for case in cases:
        spread = Spread.of(found[case]["seconds"])
        rate = case.examples / spread.median
        print(f"{getattr(case, name):>10} {spread!s:>36} {rate:>11.1f} {rate * case.length:>10.0f}")
        points.append((float(getattr(case, name)), spread.median))
    if len(points) > 1:
        slope, start = straight_line(points)
        print(f"           a straight line through these: {start:.2f} s + {slope:.3g} s x {name}")
    return points


def straight_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and start of the line with the least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4, 8], help=f"of {BLOCKS} blocks together")
    parser.add_argument("--length", type=int, nargs="+", default=[16, 32, 64, 128], help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point (default: 3)")
    parser.add_argument("--delay", type=float, default=20.0, help="of each link one way, in ms (default: 20)")
    parser.add_argument("--rate", type=float, default=100.0, help="of each link each way, in Mbit/s (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write a picture (SVG) of each dimension here")
    arguments = parser.parse_args()

    swept = (arguments.examples, arguments.servers, arguments.length)
    middle = Case(*(sorted(values)[len(values) // 2] for values in swept))
    series = {
        name: [replace(middle, **{name: value}) for value in getattr(arguments, name)]
        for name in ("examples", "servers", "length")
    }
    link = LinkProfile(delay=arguments.delay / 1000, up_mbps=arguments.rate, down_mbps=arguments.rate)
    print(f"{BLOCKS} blocks, hidden {HIDDEN}; links of {arguments.delay:g} ms, {arguments.rate:g} Mbit/s each way")
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        found = measure((case for cases in series.values() for case in cases), link, arguments.repeats, Path(folder))
    for name, cases in series.items():
        points = say_series(name, cases, found)
        if arguments.plot:
            arguments.plot.mkdir(parents=True, exist_ok=True)
            picture = line_plot("time of an evaluation", name, "seconds", {"median": points})
            (arguments.plot / f"{name}.svg").write_text(picture, encoding="utf-8")
    if arguments.json:
        points = [
            {"examples": case.examples, "servers": case.servers, "length": case.length, **record}
            for case, record in found.items()
        ]
        everything = {"link": {"delay": link.delay, "rate": arguments.rate}, "hidden": HIDDEN, "points": points}
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

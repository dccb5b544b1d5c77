"""Time our evaluation on paced servers behind an emulated network, beside the floor, the simulator and Petals' loop.

    .venv/bin/python scripts/bench_paced.py link server --json > paced.json
    .venv/bin/python scripts/bench_paced.py --petals mixed            # needs scripts/petals_peer.sh, once

A paced server computes nothing: it waits as long as an accelerator would (`pace` of the stub's settings). So this
machine's processors are the client's, and what is measured is the client's and not theirs. The regimes are those of
petals_eval/simulator/regimes.py. "first" are evaluations on a new connection, "warm" those after them; both are shares
of the floor, which no client can undercut. Where the processors are busier than 85% a figure says nothing of the
client. Exit code 1: a prediction differs from Petals' loop, or --compare found something slower.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import psutil  # noqa: E402
from bench_loops import DHT_PREFIX, Loop  # noqa: E402
from bench_workloads import PREFIX, make_llama, make_task  # noqa: E402

from petals_eval.bench.compared import Older  # noqa: E402
from petals_eval.bench.statistics import Spread  # noqa: E402
from petals_eval.errors import PetalsEvalError  # noqa: E402
from petals_eval.local_swarm import LocalSwarm  # noqa: E402
from petals_eval.local_swarm.network import EmulatedNetwork  # noqa: E402
from petals_eval.simulator.floor import run_floor  # noqa: E402
from petals_eval.simulator.regimes import PROMPT_TOKENS, REGIMES, regime  # noqa: E402
from petals_eval.simulator.scenario import Scenario  # noqa: E402
from petals_eval.simulator.simulation import simulate  # noqa: E402

BATCH_SIZES = (32, 128)  # of Petals' loop
BUSIEST = 0.85


@contextlib.contextmanager
def swarm_of(scenario: Scenario, model: Path) -> Iterator[LocalSwarm]:
    """The servers of a scenario on the real wire, behind its links."""
    client = scenario.client
    with EmulatedNetwork(client_up_mbps=client.up_mbps, client_down_mbps=client.down_mbps) as network:
        paces = [{"pace": each.tokens_per_second, "call_seconds": each.call_seconds} for each in scenario.servers]
        first, *others = scenario.servers
        swarm = LocalSwarm(
            model,
            spans=[first.blocks],
            dht_prefix=DHT_PREFIX,
            network=network,
            links=[first.link],
            dtype=scenario.dtype,
            max_batch_size=first.max_tokens,
            **paces[0],
        )
        with swarm:
            for server, pace in zip(others, paces[1:], strict=True):
                swarm.add_server(server.blocks, link=server.link, **pace)
            yield swarm


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluate on one regime, in turn with Petals' loop where that was asked for."""
    scenario = regime(name, rows=arguments.rows)
    tokens = tuple(each - PROMPT_TOKENS for each in scenario.tokens)
    model, adapter = make_llama(folder / f"hidden{scenario.hidden_size}", hidden=scenario.hidden_size)
    task, data = make_task(folder / name, rows=scenario.rows, tokens=tokens)
    environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        swarm = stack.enter_context(swarm_of(scenario, model))
        common = {"model": str(model), "adapter": str(adapter), "initial_peers": swarm.initial_peers}
        ours = Loop(sys.executable, ROOT / "scripts" / "evaluation_loop.py", environment, folder / f"{name}.log")
        stack.enter_context(ours)
        settings = json.loads(arguments.swarm)
        texts = ours.ask(
            **common, dht_prefix=DHT_PREFIX, task=task, data=str(data), limit=None, what="rows", swarm=settings
        )
        # A token a letter, one in front, the prompt: the simulator draws others of the same lengths.
        positions = sum(len(text) + 1 + PREFIX for text in texts["texts"])
        floor = run_floor(scenario)
        seconds = floor.flow * positions / sum(scenario.lengths) + floor.one_pass
        print(f"{name}: {scenario.rows} rows, floor {seconds:.1f} s", file=sys.stderr)
        petals = stack.enter_context(petals_loop(common, texts, tokens, folder)) if arguments.petals else None
        found: dict[str, list[float]] = {"first": [], "warm": [], "busy": [], "petals": []}
        retries, different = 0, 0
        for turn in range(arguments.pairs):
            new_connection = {**settings, "deadline": 300.0 + turn}  # other settings are another connection
            for kind in ("first", "warm"):
                psutil.cpu_percent()
                answer = ours.ask(what="evaluate", swarm=new_connection)
                busy = psutil.cpu_percent() / 100
                found["busy"].append(busy)
                found[kind].append(seconds / answer["seconds"])
                retries += answer["retries"]
                share = f"{found[kind][-1]:.0%} of the floor"
                print(f"  {kind}: {answer['seconds']:.1f} s, {share}, processors {busy:.0%} busy", file=sys.stderr)
            if petals is not None:
                times = [petals.ask(**texts, batch_size=size, padding="longest") for size in BATCH_SIZES]
                different += sum(map(int.__ne__, answer["predictions"], times[-1]["predictions"]))
                best = min(each["seconds"] for each in times)
                found["petals"].append(best / answer["seconds"])
                print(f"  Petals' loop: {best:.1f} s, {found['petals'][-1]:.1f} times as long", file=sys.stderr)
    told = {
        "name": name,
        "rows": scenario.rows,
        "first": asdict(Spread.of(found["first"])),
        "warm": asdict(Spread.of(found["warm"])),
        "floor_seconds": seconds,
        "busy": max(found["busy"]),
        "petals_ratio": Spread.of(found["petals"]).median if found["petals"] else None,
        "retries": retries,
    }
    if arguments.simulated:
        shares = simulate(regime(name, rows=arguments.rows, **settings), evaluations=2).shares
        told["simulated"] = dict(zip(("first", "warm"), shares, strict=True))
    if told["busy"] > BUSIEST:
        print(f"  processors were up to {told['busy']:.0%} busy: this says little of the client", file=sys.stderr)
    if different:
        raise SystemExit(f"{name}: {different} predictions differ from Petals' loop")
    return told


@contextlib.contextmanager
def petals_loop(common: dict, texts: dict, tokens: tuple[int, ...], folder: Path) -> Iterator[Loop]:
    """Petals' own client, connected."""
    from tests.interop.real_petals import petals_environment
    from tests.interop.server_kinds import PETALS

    if not PETALS.is_there:
        raise SystemExit(PETALS.not_there)
    script = ROOT / "tests" / "interop" / "petals_loop.py"
    with Loop(PETALS.python, script, petals_environment(folder), folder / "petals.log") as loop:
        some = {key: values[:8] for key, values in texts.items()}
        loop.ask(**common, dht_prefix=DHT_PREFIX, tuning_mode="ptune", max_length=tokens[1], padding="longest", **some)
        yield loop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regimes", nargs="+", metavar="REGIME", choices=REGIMES, help=", ".join(REGIMES))
    parser.add_argument("--rows", type=int, help="rows to be evaluated (default: the regime's)")
    parser.add_argument("--pairs", type=int, default=3, help="evaluations on a new connection, and after it")
    parser.add_argument("--petals", action="store_true", help="time Petals' own loop in turn, too")
    parser.add_argument("--simulated", action="store_true", help="say what the simulator makes of the same")
    parser.add_argument("--swarm", default="{}", metavar="JSON", help="more settings of our client")
    parser.add_argument("--json", action="store_true", help="print the JSON of petals_eval/bench/schemas on stdout")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="end with 1 where something got slower")
    arguments = parser.parse_args()
    try:
        older = None if arguments.compare is None else Older.read(arguments.compare)
        with tempfile.TemporaryDirectory(prefix="bench-paced-") as folder:
            regimes = [measure(name, arguments, Path(folder)) for name in arguments.regimes]
        told = {"schema_version": 1, "benchmark": "paced", "regimes": regimes}
        slower = 0 if older is None else older.compare(told, partial(print, file=sys.stderr))
    except PetalsEvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(told, indent=2))
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())

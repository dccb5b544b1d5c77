"""Time our evaluation against the Petals client's own loop: same real Petals servers, in turn, raw text to metrics.

    scripts/petals_peer.sh                                     # once: an environment with Petals
    .venv/bin/python scripts/bench_vs_petals.py --workload trec-test --json trec-test.json

Servers stand behind an emulated network (petals_eval/local_swarm/network.py). Both clients are warm processes, of one
arithmetic thread each; Petals' loop runs padded to the longest of each batch, at the batch size that is fastest here.
Ours runs at its defaults. Predictions must agree on every row. A machine is noisy, and all of this shares its
processors: only ratios within one run mean something, and the floor is printed beside them.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # tests.interop starts real Petals servers

from bench_loops import DHT_PREFIX, Loop, agree  # noqa: E402
from bench_workloads import Workload, Workloads  # noqa: E402

from petals_eval.bench.floor import Floor, link_seconds, pass_seconds  # noqa: E402
from petals_eval.bench.processes import connected_ports, memory, processor_seconds  # noqa: E402
from petals_eval.bench.statistics import Spread  # noqa: E402
from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile  # noqa: E402
from tests.interop.real_petals import RealPetalsSwarm, petals_environment  # noqa: E402
from tests.interop.server_kinds import PETALS  # noqa: E402


class Bench:
    """One workload on its running swarm."""

    def __init__(self, workload: Workload, swarm: RealPetalsSwarm, network: EmulatedNetwork | None):
        self.workload = workload
        self.swarm = swarm
        self._network = network
        self.runs: list[dict] = []

    def run(self, side: str, loop: Loop, rows: int, **settings: object) -> dict:
        """Time one evaluation and what it took of everybody. Returns the record; the loop's answer is in `answer`."""
        before = self._counters(loop)
        answer = loop.ask(**settings)
        after = self._counters(loop)
        self._check_links(loop)
        seconds = answer["seconds"]
        servers = [new - old for old, new in zip(before["servers"], after["servers"], strict=True)]
        links = [new.since(old) for old, new in zip(before["links"], after["links"], strict=True)]
        floor = Floor(
            link=link_seconds(links),
            latency=pass_seconds(self._quickest_route()),
            servers=max(max(servers), sum(servers) / os.cpu_count()),
            client=sum(after["client"]) - sum(before["client"]),
        )
        record = {
            "side": side,
            "settings": {key: value for key, value in settings.items() if key in ("batch_size", "padding", "swarm")},
            "rows": rows,
            "seconds": seconds,
            "rows_per_second": rows / seconds,
            "accuracy": answer["accuracy"],
            "retries": answer.get("retries"),
            "floor": asdict(floor),
            "floor_share": floor.largest[1] / seconds,
            "link_use": floor.link / seconds,
            "server_processor_seconds": servers,
            "client_processor_seconds": dict(
                zip(("itself", "children"), map(float.__sub__, after["client"], before["client"]), strict=True)
            ),
            "relay_processor_seconds": after["relays"] - before["relays"],
            "links": [asdict(each) for each in links],
            "client_memory": memory(loop.processes()),
        }
        self.runs.append(record)
        return record | {"answer": answer}

    def _check_links(self, loop: Loop) -> None:
        """Refuse to measure a client that goes around the relays: every connection must end at one."""
        if self._network is None:
            return
        relays = {int(server.address.split("/")[4]) for server in self.swarm.servers}
        around = [port for port in connected_ports(loop.processes()) if port not in relays]
        if around:
            raise SystemExit(f"a client is connected to the ports {around}, which are no relays: {sorted(relays)}")

    def _quickest_route(self) -> list[LinkProfile]:
        """Of the servers of each span, the link with the shortest delay."""
        links = zip(self.workload.spans, self.workload.links, strict=True) if self.workload.links else ()
        return list(dict(sorted(links, key=lambda each: -each[1].delay)).values())

    def _counters(self, loop: Loop) -> dict:
        links, relays = [], 0.0
        if self._network is not None:
            links, _ = self._network.use()
            relays = self._network.processor_seconds()
        return {
            "servers": [processor_seconds(server.processes()) for server in self.swarm.servers],
            "client": [processor_seconds([loop.processes()[0]]), processor_seconds(loop.processes()[1:])],
            "links": links,
            "relays": relays,
        }


@contextlib.contextmanager
def running(workload: Workload, folder: Path, limit: int | None) -> Iterator[tuple[Bench, Loop, Loop, dict]]:
    """The swarm of the workload, both clients (ours and Petals'), connected, and the texts with their labels.

    limit: of the rows; None: all.
    """
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(EmulatedNetwork()) if workload.links else None
        swarm = RealPetalsSwarm(
            workload.model,
            workload.spans,
            dht_prefix=DHT_PREFIX,
            dtype=workload.dtype,
            network=network,
            **({"links": workload.links} if network else {}),
            kind=PETALS,
            timeout=300,
        )
        stack.enter_context(swarm)
        common = {
            "model": str(workload.model),
            "adapter": None if workload.adapter is None else str(workload.adapter),
            "initial_peers": swarm.initial_peers,
            "dht_prefix": DHT_PREFIX,
        }
        environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        ours = Loop(sys.executable, ROOT / "scripts" / "evaluation_loop.py", environment, folder / "ours.log")
        stack.enter_context(ours)
        data = ours.ask(**common, task=workload.task, data=str(workload.data), limit=limit, what="rows")
        petals = Loop(
            PETALS.python,
            ROOT / "tests" / "interop" / "petals_loop.py",
            petals_environment(folder),
            folder / "petals.log",
        )
        stack.enter_context(petals)
        some = {key: values[:8] for key, values in data.items()}
        if workload.adapter is None:
            petals.ask(**common, **some)
        else:
            state = workload.adapter / "petals_state_dict.pt" if workload.adapter.is_dir() else workload.adapter
            petals.ask(
                **common | {"adapter": str(state)},
                tuning_mode=workload.tuning_mode,
                max_length=workload.max_length,
                **some,
                padding="longest",
            )
        yield Bench(workload, swarm, network), ours, petals, data


def compare(workload: Workload, folder: Path, pairs: int, limit: int | None, batch_sizes: list[int] | None) -> dict:
    """Our client against Petals' own, in turn on the same servers."""
    with running(workload, folder, limit) as (bench, ours, petals, data):
        rows = len(data["labels"])
        sweep = {}
        for size in batch_sizes or workload.batch_sizes:
            some = {key: values[: workload.sweep_rows] for key, values in data.items()}
            record = bench.run("petals, sweep", petals, len(some["labels"]), **some, batch_size=size, padding="longest")
            sweep[size] = record["rows_per_second"]
            print(f"  Petals' loop at batch size {size}: {record['rows_per_second']:.1f} rows/s")
        best = max(sweep, key=lambda size: sweep[size])
        bench.run("ours, warm-up", ours, rows, what="evaluate")

        found: dict[str, list[float]] = {"longest": [], "padded": []}
        agreement = []
        theirs = {"batch_size": best, **data}
        for pair in range(pairs):
            turns = [("ours", ours, {}), ("petals", petals, theirs | {"padding": "longest"})]
            records = {
                side: bench.run(side, loop, rows, **settings)
                for side, loop, settings in (reversed(turns) if pair % 2 else turns)  # nobody always goes first
            }
            first, second = records["ours"], records["petals"]
            agreement.append(agree(first["answer"], second["answer"]))
            found["longest"].append(second["seconds"] / first["seconds"])
            say_pair(pair, first, second, found["longest"][-1], agreement[-1])
            if workload.padded:
                third = bench.run("petals, padded", petals, rows, **theirs, padding="max_length")
                found["padded"].append(third["seconds"] / first["seconds"])
                print(f"     Petals padded to {workload.max_length}: {third['seconds']:.2f} s,", end=" ")
                print(f"{found['padded'][-1]:.2f} times")
        for name, ratios in found.items():
            if ratios:
                print(f"ratio to Petals {name}: {Spread.of(ratios)}")
        return {
            "rows": rows,
            "best_batch_size": best,
            "sweep": sweep,
            "ratios": found,
            "agreement": agreement,
            "runs": bench.runs,
        }


def compare_with_itself(workload: Workload, folder: Path, pairs: int, limit: int | None) -> dict:
    """Our client with all servers against our client without some of them."""
    with running(workload, folder, limit) as (bench, ours, _, data):
        rows = len(data["labels"])
        without = [bench.swarm.servers[index].peer_id for index in workload.leave_out]
        some, every = {"deny_servers": without}, {}
        for settings in (some, every):
            bench.run("ours, warm-up", ours, rows, what="evaluate", swarm=settings)
        ratios, agreement = [], []
        for pair in range(pairs):
            records = {}
            for name, settings in [("all", every), ("without", some)][:: -1 if pair % 2 else 1]:
                records[name] = bench.run(f"ours, {name}", ours, rows, swarm=settings)
            ratios.append(records["without"]["seconds"] / records["all"]["seconds"])
            agreement.append(agree(records["all"]["answer"], records["without"]["answer"]))
            say_pair(pair, records["all"], records["without"], ratios[-1], agreement[-1])
        print(f"rate with all servers to that of the fast ones alone: {Spread.of(ratios)}")
        return {"rows": rows, "ratios": {"all to fast alone": ratios}, "agreement": agreement, "runs": bench.runs}


def say_pair(pair: int, first: dict, second: dict, ratio: float, agreement: dict) -> None:
    print(f"{pair + 1:3}. ratio {ratio:.2f}; {agreement['different']} predictions differ", end="")
    print(f" (of {agreement['classes']} classes; probabilities by {agreement['largest_difference']:.1e} at most)")
    for record in (first, second):
        floor = record["floor"]
        print(
            f"     {record['side']:14} {record['seconds']:7.2f} s {record['rows_per_second']:7.1f} rows/s"
            f"  accuracy {record['accuracy']:.4f}"
            f"  floor: link {floor['link']:.2f} latency {floor['latency']:.2f} servers {floor['servers']:.2f}"
            f" client {floor['client']:.2f} s: {record['floor_share']:.0%} of the time; busiest link"
            f" {record['link_use']:.0%} full; relays {record['relay_processor_seconds']:.2f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*Workloads.names(), "push"], required=True)
    parser.add_argument("--pairs", type=int, default=3, help="interleaved pairs (default: 3)")
    parser.add_argument("--rows", type=int, help="only so many of the workload's rows (for a try)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="batch sizes Petals' loop is tried with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    arguments = parser.parse_args()
    if arguments.workload == "push":
        return finish("push", measure_push(arguments.pairs, arguments.rows), arguments.json)
    if not PETALS.is_there:
        print(PETALS.not_there, file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory(prefix="bench-vs-petals-") as folder:
        workload = Workloads(Path(folder)).make(arguments.workload)
        print(f"{arguments.workload}: {workload.data.name}, servers {workload.spans}, links {workload.links}")
        if workload.note:
            print(f"  {workload.note}")
        if workload.leave_out:
            result = compare_with_itself(workload, Path(folder), arguments.pairs, arguments.rows)
        else:
            result = compare(workload, Path(folder), arguments.pairs, arguments.rows, arguments.batch_sizes)
    return finish(arguments.workload, result, arguments.json)


def measure_push(pairs: int, limit: int | None) -> dict:
    """Needs no Petals."""
    from bench_push import compare_pushing

    with tempfile.TemporaryDirectory(prefix="bench-push-") as folder:
        return compare_pushing(Workloads(Path(folder)).push(), Path(folder), pairs, limit)


def finish(name: str, result: dict, file: Path | None) -> int:
    """Write what was measured; the exit code says whether all predictions agree."""
    result |= {"workload": name, "processors": os.cpu_count()}
    if file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    different = sum(each["different"] for each in result["agreement"])
    if different:
        print(f"error: {different} predictions differ", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

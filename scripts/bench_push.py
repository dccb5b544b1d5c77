"""The workload `push` of bench_vs_petals.py: our client with servers that push to each other against itself without.

    .venv/bin/python scripts/bench_vs_petals.py --workload push

The servers are this project's own (a local swarm), free of load but for small blocks; what is narrow is the client's
uplink, which all hops share. After the pairs one run at the default, "auto", which has to find out by itself.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_loops import DHT_PREFIX, ROOT, Loop, agree
from bench_workloads import PushWorkload

from petals_eval.bench.statistics import Spread
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile

DELAY = 0.02  # seconds each way


@contextlib.contextmanager
def running(workload: PushWorkload, folder: Path, limit: int | None) -> Iterator[tuple[EmulatedNetwork, Loop, int]]:
    """The network, our client, connected, and the number of rows."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(EmulatedNetwork(client_up_mbps=workload.uplink))
        swarm = LocalSwarm(
            workload.model,
            spans=workload.spans,
            dht_prefix=DHT_PREFIX,
            dtype=workload.dtype,
            network=network,
            links=LinkProfile(delay=DELAY),
        )
        stack.enter_context(swarm)
        environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
        ours = Loop(sys.executable, ROOT / "scripts" / "evaluation_loop.py", environment, folder / "ours.log")
        stack.enter_context(ours)
        data = ours.ask(
            model=str(workload.model),
            adapter=str(workload.adapter),
            initial_peers=swarm.initial_peers,
            dht_prefix=DHT_PREFIX,
            task=workload.task,
            data=str(workload.data),
            limit=limit,
            what="rows",
        )
        yield network, ours, len(data["texts"])


def compare_pushing(workload: PushWorkload, folder: Path, pairs: int, limit: int | None, *, auto: bool = True) -> dict:
    """Interleaved pairs of push="always" and push="never", each on a connection of its own."""
    with running(workload, folder, limit) as (network, ours, rows):
        runs = []

        def run(push: str) -> dict:
            before = network.use()[1]
            answer = ours.ask(what="evaluate", swarm={"push": push}, limit=limit)
            use = network.use()[1].since(before)
            record = {
                "push": push,
                "rows": rows,
                "rows_per_second": rows / answer["seconds"],
                "uplink_bytes": use.bytes_up,
                "uplink_use": use.busy_up / answer["seconds"],
            } | {name: answer[name] for name in ("seconds", "accuracy", "retries")}
            runs.append(record)
            print(
                f"     {push:7} {record['seconds']:7.2f} s {record['rows_per_second']:6.1f} rows/s; uplink"
                f" {use.bytes_up / 1e6:.1f} MB, {record['uplink_use']:.0%} full; {record['retries']} retries",
                flush=True,
            )
            return answer

        for push in ("always", "never", "auto"):  # connected, and every server asked what it is
            ours.ask(what="evaluate", swarm={"push": push}, limit=4)
        ratios, agreement = [], []
        for pair in range(pairs):
            answers = {push: run(push) for push in ("always", "never")[:: -1 if pair % 2 else 1]}
            ratios.append(answers["never"]["seconds"] / answers["always"]["seconds"])
            agreement.append(agree(answers["always"], answers["never"]))
            print(f"{pair + 1:3}. ratio {ratios[-1]:.2f}; {agreement[-1]['different']} predictions differ", end="")
            print(f" (probabilities by {agreement[-1]['largest_difference']:.1e} at most)", flush=True)
        print(f"rate with pushing to that without: {Spread.of(ratios)}")
        found = {"push to ordinary": ratios}
        if auto:
            answer = run("auto")
            agreement.append(agree(answer, answers["never"]))
            found["auto to ordinary"] = [answers["never"]["seconds"] / answer["seconds"]]
            print(f'rate at the default, "auto", to that without pushing: {found["auto to ordinary"][0]:.2f}')
        return {"rows": rows, "ratios": found, "agreement": agreement, "runs": runs}

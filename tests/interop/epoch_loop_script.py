"""The loop of guides/epoch_loop.md, run by the real client of Petals: test_epoch_loop.py starts it.

Reads JSON settings from stdin and writes what came of the loop on each swarm to stdout:

    guide           its Python: the loop, the plot, and the same with transformers' Trainer
    swarms          {name: {"initial_peers": multiaddresses, "dht_prefix": ...}}; each has its folder of that name, with
                    my-llama, train.jsonl and test.jsonl
    tuning_mode     "ptune" or "deep_ptune"
    trained_by_it   the names of the swarms on which Trainer trains, too
"""

import json
import os
import sys

import loopback_only  # noqa: F401
import matplotlib

matplotlib.use("Agg")


def run_loop(settings: dict, name: str, swarm: dict) -> dict:
    loop, plot, trainer = (
        block.replace('"my-llama"', repr(swarm["dht_prefix"])).replace('"deep_ptune"', repr(settings["tuning_mode"]))
        for block in settings["guide"]
    )
    os.chdir(os.path.join(settings["folder"], name))  # noqa: PTH118
    names = {"peers": swarm["initial_peers"]}
    exec(loop, names)
    exec(plot, names)
    answer = {"losses": names["losses"], "metrics": metrics(names["results"]), "logged": []}
    if name in settings["trained_by_it"]:
        exec(trainer.replace('"checkpoints",', '"checkpoints", report_to=[], use_cpu=True,'), names)
        answer["logged"] = names["trainer"].state.log_history
    manager = names["model"].transformer.h.sequence_manager
    manager.shutdown()
    manager.dht.shutdown()
    return answer


def metrics(results: list) -> list:
    return [{key: metric.value for key, metric in result.metrics.items()} for result in results]


if __name__ == "__main__":
    given = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # the loop prints
    json.dump({name: run_loop(given, name, swarm) for name, swarm in given["swarms"].items()}, out)
    out.flush()
    os._exit(0)  # hivemind's P2P objects print tracebacks when the garbage collector ends them after their loop

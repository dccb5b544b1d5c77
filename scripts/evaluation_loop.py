"""Our own evaluation for bench_vs_petals.py: the counterpart of tests/interop/petals_loop.py, a long-lived process.

Reads JSON settings from stdin and writes a line of JSON to stdout for each line of them. Lines after the first say only
what changes, and find the model and the swarm warm:

    model, adapter  folders
    initial_peers   multiaddresses
    dht_prefix      prefix of the blocks' uids
    task, data      as petals_eval.evaluate takes them
    limit           the first so many rows; null: all
    swarm           more settings of petals_eval.config.SwarmSettings; other ones are another connection
    what            "rows" -> {"texts": [...], "labels": [...]}, as the model is to read them (the first line), and
                    {"requests": [[[ids, targets], ...], ...], "labels": [...]} for a task of choices, or
                    "evaluate" -> {"predictions": [...], "probabilities": [[...]], "accuracy", "seconds", "retries"}, or
                    "lm_eval" -> the same of a task of choices, asked by the backend of lm-evaluation-harness
    no_noise        whether no rows are computed again at the end
    profile         a file that cProfile writes, or null
"""

import contextlib
import cProfile
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_loops import softmax

import petals_eval
from petals_eval.data import Rows, load_rows, sample
from petals_eval.remote_model import RemoteModel
from petals_eval.tasks import load_task, resolve_source


def rows_of(settings: dict) -> Rows:
    return sample(load_rows(resolve_source(load_task(settings["task"]), settings["data"])), settings.get("limit"), 0)


def examples(model: RemoteModel, settings: dict) -> dict:
    task = load_task(settings["task"])
    found = list(task.examples(rows_of(settings), model.local.tokenizer))
    if task.kind == "choice":
        asked = [[[each.input_ids, each.targets] for each in example.requests] for example in found]
        return {"requests": asked, "labels": [each.label for each in found]}
    return {"texts": [each.text for each in found], "labels": [each.label for each in found]}


def evaluate(model: RemoteModel, settings: dict) -> dict:
    profile = cProfile.Profile() if settings.get("profile") else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "run"
        with profile:
            started = time.perf_counter()
            result = petals_eval.evaluate(
                model,
                task=settings["task"],
                data=settings["data"],
                limit=settings.get("limit"),
                out=out,
                no_noise=settings.get("no_noise", False),
            )
            seconds = time.perf_counter() - started
        if settings.get("profile"):
            profile.dump_stats(settings["profile"])
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: int(line["key"]))
    return {
        "seconds": seconds,
        "accuracy": result.metrics["accuracy" if "accuracy" in result.metrics else "acc"].value,
        "retries": result.retries,
        "predictions": [line["prediction"] for line in lines],
        "probabilities": [line.get("probabilities") or softmax(line["log_likelihood"]) for line in lines],
    }


def harness(model: RemoteModel, settings: dict) -> dict:
    """As the harness asks: a text and one of its continuations each, of all rows together."""
    from lm_eval.api.instance import Instance

    from petals_eval.integrations.lm_eval import LM

    task, rows = load_task(settings["task"]), rows_of(settings)
    asked = [task.pairs(rows, row, model.local.tokenizer) for row in rows]
    labels = [example.label for example in task.examples(rows, model.local.tokenizer)]
    requests = [Instance("loglikelihood", {}, pair, row) for row, pairs in enumerate(asked) for pair in pairs]
    lm = LM(model)
    retries = model.blocks.status().retries
    started = time.perf_counter()
    found = iter(lm.loglikelihood(requests, disable_tqdm=True))
    likelihoods = [[next(found)[0] for _ in pairs] for pairs in asked]
    predictions = [max(range(len(row)), key=row.__getitem__) for row in likelihoods]
    accuracy = sum(map(int.__eq__, predictions, labels)) / len(labels)
    return {
        "seconds": time.perf_counter() - started,
        "accuracy": accuracy,
        "retries": model.blocks.status().retries - retries,
        "predictions": predictions,
        "probabilities": list(map(softmax, likelihoods)),
    }


def answers(lines: Iterator[str]) -> Iterator[dict]:
    settings: dict = {"swarm": {}, "what": "evaluate"}
    models: dict[str, RemoteModel] = {}
    with contextlib.ExitStack() as stack:
        for line in lines:
            settings |= json.loads(line)
            connection = json.dumps(settings["swarm"], sort_keys=True)
            if connection not in models:
                model = RemoteModel.from_pretrained(
                    settings["model"],
                    adapter=settings["adapter"],
                    initial_peers=settings["initial_peers"],
                    dht_prefix=settings["dht_prefix"],
                    **settings["swarm"],
                )
                models[connection] = stack.enter_context(model)
            kinds = {"rows": examples, "evaluate": evaluate, "lm_eval": harness}
            yield kinds[settings["what"]](models[connection], settings)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    for answer in answers(sys.stdin):
        print(json.dumps(answer), flush=True)

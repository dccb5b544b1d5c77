"""Petals' own client and its users' evaluation loop, run in the Petals environment for comparison.

Reads JSON settings from stdin and writes a line of JSON to stdout for each line of them. Lines after the first say only
what changes, and find the model and the swarm warm:

    model           folder
    initial_peers   multiaddresses
    dht_prefix      prefix of the blocks' uids
    dtype           what the client computes in (default "float32")
    adapter         a Petals state dict with prompts and head, or null
    tuning_mode     "ptune" or "deep_ptune", with an adapter
    save            lines of Python that save the `model` with an adapter, before it answers
    tokens          classify these lists of token ids, one at a time, with this `pad_token_id` -> {"logits": [[...]]}
    texts           or these ...            -> {"logits": [[...]], "predictions": [...], "seconds": ...}
    max_length      ... cut to this many tokens (default 96), `batch_size` (default 32) of them at a time
    padding         "longest" or "max_length" (the default: as in Petals' SST-2 example)
    requests        or score these: for each row its choices, each [token ids, [[position, token], ...]], `batch_size`
                    of them at a time -> {"logits": [[likelihoods of the choices]], "predictions": [...], ...}
    labels          right answers, one a text: the "seconds" are up to the "accuracy" that is answered, too
    generate        or go on greedily from these token ids ...      -> {"tokens": [...]}
    max_new_tokens  ... by this many
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial

import loopback_only  # noqa: F401
import torch
from petals import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from transformers import PreTrainedTokenizerFast


def load(kind, settings: dict, **options):
    return kind.from_pretrained(
        settings["model"],
        initial_peers=settings["initial_peers"],
        dht_prefix=settings["dht_prefix"],
        torch_dtype=getattr(torch, settings.get("dtype", "float32")),
        max_retries=5,
        show_route=False,
        **options,
    )


def load_classifier(settings: dict):
    """The model with its prompts and head. The adapter's shapes say how many prefix tokens and labels there are."""
    state = torch.load(settings["adapter"])
    base = "model" if "model.prompt_embeddings.weight" in state else "transformer"
    model = load(
        AutoDistributedModelForSequenceClassification,
        settings,
        tuning_mode=settings["tuning_mode"],
        pre_seq_len=state[f"{base}.prompt_embeddings.weight"].shape[0],
        num_labels=state["score.weight"].shape[0],
    )
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        sys.exit(f"the adapter does not fit the model: {unexpected}")
    return model


def classify(model, settings: dict) -> dict:
    """The evaluation loop of Petals' SST-2 example: padded on the right, the attention mask dropped."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings["model"])
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    size = settings.get("batch_size", 32)
    logits = []
    started = time.perf_counter()
    model.eval()
    for first in range(0, len(settings["texts"]), size):
        batch = tokenizer(
            settings["texts"][first : first + size],
            padding=settings.get("padding", "max_length"),
            truncation=True,
            max_length=settings.get("max_length", 96),
            return_tensors="pt",
        )
        with torch.no_grad():
            logits.append(model(input_ids=batch["input_ids"]).logits)
    every = torch.cat(logits)
    predictions = every.argmax(-1).tolist()
    answer = {}
    if labels := settings.get("labels"):
        answer["accuracy"] = sum(map(int.__eq__, predictions, labels)) / len(labels)
    seconds = time.perf_counter() - started
    return answer | {"logits": every.tolist(), "predictions": predictions, "seconds": seconds}


def classify_tokens(model, settings: dict) -> dict:
    model.config.pad_token_id = settings["pad_token_id"]
    model.eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in settings["tokens"]]
    return {"logits": logits}


def score(model, settings: dict) -> dict:
    """The requests of a task of choices, one batch after the other: padded on the right to the longest of each."""
    every = [request for row in settings["requests"] for request in row]
    size = settings.get("batch_size", 32)
    likelihoods = []
    started = time.perf_counter()
    model.eval()
    for first in range(0, len(every), size):
        batch = every[first : first + size]
        longest = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        with torch.no_grad():
            scores = model(input_ids=padded).logits.float().log_softmax(-1)
        for row, (_, targets) in enumerate(batch):
            likelihoods.append(sum(float(scores[row, position, token]) for position, token in targets))
    rows, at = [], 0
    for row in settings["requests"]:
        rows.append(likelihoods[at : at + len(row)])
        at += len(row)
    predictions = [max(range(len(row)), key=row.__getitem__) for row in rows]
    accuracy = sum(map(int.__eq__, predictions, settings["labels"])) / len(rows)
    seconds = time.perf_counter() - started
    return {"logits": rows, "predictions": predictions, "accuracy": accuracy, "seconds": seconds}


def generate(model, settings: dict) -> dict:
    tokens = model.generate(
        torch.tensor([settings["generate"]]), max_new_tokens=settings["max_new_tokens"], do_sample=False
    )
    return {"tokens": tokens[0].tolist()}


def answers(lines: Iterable[str]) -> Iterator[dict]:
    tasks = {"generate": generate, "requests": score, "tokens": classify_tokens, "classify": classify}
    loaders = {
        "generate": partial(load, AutoDistributedModelForCausalLM),
        "requests": partial(load, AutoDistributedModelForCausalLM),
        "tokens": load_classifier,
        "classify": load_classifier,
    }
    settings, models = {}, {}
    for line in lines:
        settings |= json.loads(line)
        kind = next((kind for kind in ("generate", "requests", "tokens") if kind in settings), "classify")
        if kind not in models:
            models[kind] = loaders[kind](settings)
        for saving in settings.get("save", ()):
            exec(saving, {"torch": torch, "model": models[kind]})
        yield tasks[kind](models[kind], settings)
    for model in models.values():
        model.transformer.h.sequence_manager.shutdown()
        model.transformer.h.sequence_manager.dht.shutdown()


def main() -> None:
    for answer in answers(sys.stdin):
        print(json.dumps(answer), flush=True)
    os._exit(0)  # hivemind's P2P objects print tracebacks when the garbage collector ends them after their loop


if __name__ == "__main__":
    main()

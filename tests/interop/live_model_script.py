"""Live Petals models under `petals_eval.evaluate`, in their package's environment; test_live_petals_model.py asserts.

Reads JSON settings from stdin and writes JSON to stdout. Always: what ("training" or "answers"), model (folder),
initial_peers, dht_prefix, data (file). For training: adapter (a Petals state dict) and tuning_mode. `folder` is for run
folders.
"""

import copy
import gc
import json
import os
import random
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import loopback_only  # noqa: F401
import numpy as np
import torch
from petals_loop import CLIENT, load, load_classifier
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

import petals_eval
from petals_eval.data import DataSource, load_rows, sample
from petals_eval.errors import PetalsEvalError
from petals_eval.integrations import petals_model
from petals_eval.swarm import SwarmConnection

LIMIT = 100
LABEL_WORDS = (" good", " bad", " yes")


def main() -> None:
    settings = json.load(sys.stdin)
    answer = {"training": training, "answers": answers}[settings["what"]](settings)
    json.dump(answer, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # hivemind's P2P objects print tracebacks when the garbage collector ends them after their loop


# -- training goes on as if nothing had been evaluated


def training(settings: dict) -> dict:
    connections = count_connections()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings["model"])
    rows = list(load_rows(trec(settings)))
    batches = [[rows[4 * step + row] for row in range(4)] for step in range(4)]
    quiet, quiet_end = quiet_training(settings, tokenizer, batches)
    answer, watched_end = watched_training(settings, tokenizer, batches, rows, connections)
    return answer | {"quiet": quiet, "same_end": same(quiet_end, watched_end), "left_open": left_open(connections)}


def quiet_training(settings: dict, tokenizer, batches) -> tuple[list, dict]:
    model = tuned_model(settings)
    optimizer = adamw(model)
    steps = [step(model, optimizer, tokenizer, batch) for batch in batches]
    end(model)
    return steps, state_of(model, optimizer)


def watched_training(settings: dict, tokenizer, batches, rows, connections: list) -> tuple[dict, dict]:
    """The same, evaluated before, within and between the steps."""
    model = tuned_model(settings)
    optimizer = adamw(model)
    watch = Watch(model)
    answer = {"before": judge(model, settings, watch, "before")}
    steps = [step(model, optimizer, tokenizer, batches[0])]
    # Between backward and the optimizer's step, where gradients lie in the parameters, and once more after it.
    steps.append(step(model, optimizer, tokenizer, batches[1], lambda: judge(model, settings, watch, "in a step")))
    answer["after"] = judge(model, settings, watch, "after")
    answer["own"] = own_predictions(model, tokenizer, answer["after"]["keys"], rows)
    answer["connections"] = len(connections)
    answer["broken"] = interrupted(model, settings, watch)
    answer["open_after_error"] = sum(map(is_open, connections))
    steps.append(step(model, optimizer, tokenizer, batches[2]))
    judge(model, settings, watch, "again")
    answer["open_again"] = sum(map(is_open, connections))
    steps.append(step(model, optimizer, tokenizer, batches[3]))
    end(model)
    return answer | {"watched": steps, "disturbed": watch.disturbed}, state_of(model, optimizer)


def trec(settings: dict) -> DataSource:
    from petals_eval.tasks import load_task, resolve_source

    return resolve_source(load_task("trec"), settings["data"])


def tuned_model(settings: dict):
    """In training mode but for one module, with dropout before the head: evaluating in the wrong mode would show."""
    model = load_classifier(settings)
    model.config.pad_token_id = 0
    model.config.max_pinged = 0  # a thread of Petals draws from Python's generator for its pings, at any moment
    model.score.register_forward_pre_hook(lambda module, args: functional.dropout(args[0], 0.2, module.training))
    model.train()
    model.transformer.ln_f.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 9]]))  # what Petals does at its first call draws numbers, too
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return model


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)


def step(model, optimizer, tokenizer, batch, before_update=None) -> list[float]:
    """One training step. Its loss, and a draw from each random generator that a loop might use."""
    ids = [torch.tensor(tokenizer(row.columns["text"])["input_ids"]) for row in batch]
    labels = torch.tensor([int(row.columns["coarse_label"]) for row in batch])
    short = min(len(each) for each in ids)
    optimizer.zero_grad()
    loss = model(input_ids=torch.stack([each[:short] for each in ids]), labels=labels).loss
    loss.backward()
    if before_update is not None:
        before_update()
    optimizer.step()
    return [loss.item(), float(torch.rand(1)), random.random(), float(np.random.rand())]


class Watch:
    """What an evaluation must leave alone, looked at before and after each."""

    def __init__(self, model):
        self.model = model
        self.disturbed: list[str] = []

    def look(self) -> dict:
        parameters = dict(self.model.named_parameters())
        return {
            "training flags": {name: module.training for name, module in self.model.named_modules()},
            "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
            "grad_fn or inference": {name: (p.is_leaf, p.is_inference()) for name, p in parameters.items()},
            "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
            "buffers": {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()},
            "config": self.model.config.to_dict(),
            "gradients": {name: copy.deepcopy(parameter.grad) for name, parameter in parameters.items()},
            "random": random.getstate(),
            "numpy": str(np.random.get_state()),
            "torch": torch.get_rng_state(),
            "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "arithmetic": (torch.get_default_dtype(), torch.is_autocast_enabled(), torch.get_num_threads()),
        }

    def compare(self, before: dict, when: str) -> None:
        after = self.look()
        self.disturbed += [f"{when}: {what}" for what in before if not same(before[what], after[what])]


def judge(model, settings: dict, watch: Watch, name: str) -> dict:
    """Evaluate, and say what the run folder holds."""
    folder = Path(settings["folder"]) / f"{settings['tuning_mode']} {name}"
    before = watch.look()
    result = petals_eval.evaluate(model, task="trec", data=settings["data"], limit=LIMIT, seed=3, out=folder)
    watch.compare(before, name)
    return {"accuracy": result.metrics["accuracy"].value, "retries": result.retries, **read_folder(folder)}


def read_folder(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "keys": [line["key"] for line in lines],
        "predictions": [line["prediction"] for line in lines],
        "probabilities": [line["probabilities"] for line in lines],
    }


def own_predictions(model, tokenizer, keys, rows) -> dict:
    """Petals' own forward in eval mode. It draws its routes from NumPy's generator: that and the modes are put back."""
    texts = [rows[int(key)].columns["text"] for key in keys]
    modes = {module: module.training for module in model.modules()}
    numpy_state = np.random.get_state()
    model.eval()
    logits = own_logits(model, [tokenizer(text)["input_ids"][:96] for text in texts])
    for module, training_mode in modes.items():
        module.training = training_mode
    np.random.set_state(numpy_state)
    return {"predictions": logits.argmax(-1).tolist(), "probabilities": logits.softmax(-1).tolist()}


def own_logits(model, ids: list[list[int]]) -> torch.Tensor:
    """(texts, labels) of a classifier, pooled by Petals itself; its rows are as long as each other or padded with 0."""
    logits = []
    with torch.no_grad():
        for first in range(0, len(ids), 20):
            rows = [torch.tensor(each) for each in ids[first : first + 20]]
            logits.append(model(input_ids=pad_sequence(rows, batch_first=True)).logits)
    return torch.cat(logits)


class Broken(Exception):
    pass


def interrupted(model, settings: dict, watch: Watch) -> str:
    """An evaluation that somebody else's exception ends half-way."""

    class Display:
        def update(self, done: int, *_: object, **__: object) -> None:
            if done:
                raise Broken

        def waiting(self, message: str) -> None:
            pass

    before = watch.look()
    try:
        petals_eval.evaluate(model, task="trec", data=settings["data"], tokens_per_micro_batch=64, progress=Display())
    except Broken:
        watch.compare(before, "interrupted")
        return "raised"
    return "went through"


def count_connections() -> list:
    """Every connection that is opened from now on."""
    opened = []
    connect = vars(SwarmConnection)["connect"].__func__

    def connect_and_note(cls, settings):
        opened.append(connect(cls, settings))
        return opened[-1]

    SwarmConnection.connect = classmethod(connect_and_note)
    return opened


def left_open(connections: list) -> int:
    """How many are still open once the collector ran."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "petals-eval-close":
            thread.join(timeout=30)
    return sum(is_open(connection) for connection in connections)


def is_open(connection: SwarmConnection) -> bool:
    try:
        return connection.p2p is not None
    except PetalsEvalError:
        return False


def state_of(model, optimizer) -> dict:
    return {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}


def same(one: object, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def end(model) -> None:
    """End Petals' own part: its processes would keep this one's output open, and its thread the model."""
    model.transformer.h.sequence_manager.shutdown()
    model.transformer.h.sequence_manager.dht.shutdown()


# -- other families, and label words


def answers(settings: dict) -> dict:
    """A random model of another family with deep prompts: class logits and label words, ours and Petals' own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings["model"])
    data = DataSource(path=settings["data"])
    rows = list(sample(load_rows(data), None, 0))
    texts = [tokenizer(row.columns["text"])["input_ids"] for row in rows]
    names = ("a", "b", "c")
    found = {}

    task = petals_eval.ClassificationTask(name="own", text="{text}", label_column="label", label_names=names)
    model = prompted(CLIENT.AutoDistributedModelForSequenceClassification, settings, num_labels=3)
    folder = Path(settings["folder"]) / "classes"
    petals_model.connect(model, window=3)
    petals_eval.evaluate(model, task=task, data=data, out=folder)
    logits = own_logits(model, texts)
    found["classes"] = {"ours": read_folder(folder)["probabilities"], "own": logits.softmax(-1).tolist()}
    model.train()
    expected = logits.argmax(-1)
    found["batches"] = petals_eval.evaluate_batches(model, padded_batches(texts, expected.tolist()))
    found["still training"] = all(module.training for module in (model, model.transformer.ln_f, model.score))
    model.eval()
    found["window"] = read_folder(folder)["manifest"]["run_settings"]["window"]
    petals_model.close(model)
    end(model)

    task = task.model_copy(update={"label_words": LABEL_WORDS})
    model = prompted(CLIENT.AutoDistributedModelForCausalLM, settings)
    folder = Path(settings["folder"]) / "words"
    petals_eval.evaluate(model, task=task, data=data, out=folder, tokenizer=tokenizer, without_prompts=True)
    found["token batches"] = petals_eval.evaluate_batches(model, padded_batches(texts, [list(ids) for ids in texts]))
    found["own loss"] = own_loss(model, texts)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in LABEL_WORDS]
    with torch.no_grad():
        likelihoods = [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in texts]
    scores = torch.stack([each[[token for (token,) in words]] for each in likelihoods])
    found["words"] = {"ours": read_folder(folder)["probabilities"], "own": scores.softmax(-1).tolist()}
    evaluating = partial(petals_eval.evaluate, model, task=task, data=data, tokenizer=tokenizer)
    found["session"] = [in_a_session(model, texts[0], between) for between in (lambda: None, evaluating)]
    found["refused"] = refused(model, data, names)
    end(model)
    return found


def in_a_session(model, ids: list[int], between) -> list:
    """What Petals' model writes in two goes in one open session, with something in between."""
    with torch.no_grad(), model.inference_session(max_length=len(ids) + 20):
        begun = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        between()
        position = model.transformer.h.position
        return [begun.tolist(), position, model.generate(max_new_tokens=4, do_sample=False).tolist()]


def padded_batches(texts: list[list[int]], labels: list) -> list[dict[str, torch.Tensor]]:
    """What an evaluation loop has, padded on the left; labels are classes, or tokens."""
    batches = []
    for first in range(0, len(texts), 5):
        rows = texts[first : first + 5]
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        given = labels[first : first + 5]
        tokens = isinstance(given[0], list)
        batches.append(
            {
                "input_ids": torch.tensor([[0] * gap + row for gap, row in zip(gaps, rows, strict=True)]),
                "attention_mask": torch.tensor(
                    [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
                ),
                "labels": torch.tensor(
                    [[-100] * gap + row for gap, row in zip(gaps, given, strict=True)] if tokens else given
                ),
            }
        )
    return batches


def own_loss(model, texts: list[list[int]]) -> float:
    """The mean over all tokens of the loss that Petals' model gives for a text alone."""
    total = count = 0.0
    for ids in texts:
        if len(ids) > 1:
            row = torch.tensor([ids])
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, :-1]
            total += float(functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += len(ids) - 1
    return total / count


def prompted(kind, settings: dict, **options):
    torch.manual_seed(1)
    model = load(kind, settings, tuning_mode="deep_ptune", pre_seq_len=4, **options)
    model.config.pad_token_id = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_embeddings" in name or name.startswith("score."):
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def refused(model, data: DataSource, names) -> str:
    """A task with a trained head on a model that has none."""
    task = petals_eval.ClassificationTask(name="own", text="{text}", label_column="label", label_names=names)
    try:
        petals_eval.evaluate(model, task=task, data=data)
    except PetalsEvalError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


if __name__ == "__main__":
    main()

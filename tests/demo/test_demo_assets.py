"""The shipped demo under Hugging Face's own forward: the numbers a swarm has to give, and the folder's promises."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from petals_eval.demo import demo_paths

PREFIX = 8


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(demo_paths().model).eval()


@pytest.fixture(scope="module")
def prompts():
    return load_file(demo_paths().prompts / "petals_state_dict.safetensors")


@pytest.fixture(scope="module")
def examples():
    lines = demo_paths().data.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def expected():
    return json.loads(demo_paths().expected.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load(demo_paths().task.read_text(encoding="utf-8"))


@torch.inference_mode()
def predictions(model, prompts, rows, *, prompted):
    """One row at a time, so without padding. `prompts` are added to each block's first positions, as Petals does."""
    layers, hidden_size = len(model.layers), model.config.hidden_size
    deep = prompts["model.intermediate_prompt_embeddings.weight"].view(PREFIX, layers, hidden_size)

    def hook_of(block):
        def hook(module, args):
            hidden = args[0].clone()
            hidden[:, :PREFIX] += deep[:, block]
            return (hidden, *args[1:])

        return hook

    prompted_layers = enumerate(model.layers) if prompted else ()
    hooks = [layer.register_forward_pre_hook(hook_of(block)) for block, layer in prompted_layers]
    chosen = []
    for row in rows:
        embedded = model.embed_tokens(torch.tensor([row]))
        if prompted:
            embedded = torch.cat([prompts["model.prompt_embeddings.weight"][None], embedded], dim=1)
        last = model(inputs_embeds=embedded).last_hidden_state[0, -1]
        chosen.append(int((prompts["score.weight"] @ last).argmax()))
    for hook in hooks:
        hook.remove()
    return chosen


def accuracy(model, prompts, examples, task, *, prompted):
    tokenizer = AutoTokenizer.from_pretrained(demo_paths().model)
    rows = tokenizer([example["text"] for example in examples])["input_ids"]
    chosen = predictions(model, prompts, rows, prompted=prompted)
    right = [task["label_names"][label] == example["label"] for label, example in zip(chosen, examples, strict=True)]
    return sum(right) / len(right)


def test_accuracy_with_the_prompts(model, prompts, examples, task, expected):
    found = accuracy(model, prompts, examples, task, prompted=True)
    assert found == expected["accuracy"]
    assert 0.85 < found < 1


def test_accuracy_near_chance_without_the_prompts(model, prompts, examples, task, expected):
    found = accuracy(model, prompts, examples, task, prompted=False)
    assert found == expected["accuracy_without_prompts"]
    assert 0.4 <= found <= 0.6


def test_three_servers_share_the_blocks_evenly(model):
    assert len(model.layers) == 6


def test_prompts_are_a_petals_deep_ptune_state_dict(model, prompts, task):
    hidden = model.config.hidden_size
    assert {name: tuple(tensor.shape) for name, tensor in prompts.items()} == {
        "model.prompt_embeddings.weight": (PREFIX, hidden),
        "model.intermediate_prompt_embeddings.weight": (PREFIX, len(model.layers) * hidden),
        "score.weight": (len(task["label_names"]), hidden),
    }


def test_examples_are_distinct_balanced_and_not_truncated(examples, task, expected):
    assert len(examples) == expected["examples"] == 400
    assert len({example["text"] for example in examples}) == 400
    assert sum(example["label"] == "good" for example in examples) == 200
    tokenizer = AutoTokenizer.from_pretrained(demo_paths().model)
    rows = tokenizer([example["text"] for example in examples])["input_ids"]
    assert max(map(len, rows)) <= task["max_length"]
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in row for row in rows)


def test_one_word_does_not_give_the_answer(examples):
    """No word of the data splits good from bad by more than 0.7: the prompts do more than spot a keyword."""
    words = {word for example in examples for word in example["text"].split()}
    for word in sorted(words):
        right = sum((word in example["text"].split()) == (example["label"] == "good") for example in examples)
        assert max(right, len(examples) - right) <= 0.7 * len(examples), word


def test_small_enough_to_ship_and_free_of_local_paths():
    folder = demo_paths().task.parent
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    for path in files:
        content = path.read_bytes()
        assert not any(local in content for local in (b"/home/", b"/root/", b"/work/", b"/tmp/")), path

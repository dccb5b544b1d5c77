"""Petals' own checkpoints: every way they are saved, and every way they can be wrong."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from petals_eval.errors import AdapterError
from petals_eval.model import FAMILIES, Adapter, LocalModel, load_adapter
from tests.support import tiny_models

HIDDEN, BLOCKS, PREFIX, LABELS = 16, 3, 4, 2
CONFIG = SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=BLOCKS, max_position_embeddings=64)


def _load(path: Path, family: str = "llama", config=CONFIG) -> Adapter:
    return load_adapter(str(path), family=FAMILIES[family], config=config)


def _state(base: str = "model.", deep: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{base}prompt_embeddings.weight": torch.randn(PREFIX, HIDDEN, generator=generator),
        "score.weight": torch.randn(LABELS, HIDDEN, generator=generator),
    }
    if deep:
        state[f"{base}intermediate_prompt_embeddings.weight"] = torch.randn(
            PREFIX, BLOCKS * HIDDEN, generator=generator
        )
    return state


def _saved(state, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def _right(adapter: Adapter, base: str = "model.") -> bool:
    """Whether the adapter holds the values of `_state()` in their places."""
    state = _state(base)
    deep = state[f"{base}intermediate_prompt_embeddings.weight"]
    blocks = [deep[:, block * HIDDEN : (block + 1) * HIDDEN] for block in range(BLOCKS)]
    return (
        adapter.kind == "deep_ptune"
        and adapter.prefix_length == PREFIX
        and torch.equal(adapter.prompts, state[f"{base}prompt_embeddings.weight"])
        and torch.equal(adapter.deep_prompts, torch.stack(blocks).unsqueeze(1))
        and torch.equal(adapter.head_weight, state["score.weight"])
        and adapter.head_bias is None
    )


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_each_familys_keys(family, tmp_path):
    base = "transformer." if family in ("bloom", "falcon") else "model."
    assert _right(_load(_saved(_state(base), tmp_path / "prompts.pt"), family), base)


@pytest.mark.parametrize("name", ("a.pt", "a.bin", "a.pth", "a.safetensors"))
def test_a_file_or_the_folder_that_holds_it(name, tmp_path):
    path = _saved(_state(), tmp_path / "sst2-prompts" / name)
    assert _right(_load(path)) and _load(path).name == name
    assert _right(_load(path.parent)) and _load(path.parent).name == "sst2-prompts"


def test_ptune_alone_and_without_a_head(tmp_path):
    state = _state(deep=False)
    del state["score.weight"]
    adapter = _load(_saved(state, tmp_path / "a.pt"))
    assert adapter.kind == "ptune" and adapter.deep_prompts is None and adapter.head_weight is None


@pytest.mark.parametrize("base", ("", "module.model.", "module."))
def test_the_bare_model_and_data_parallel_wrappers(base, tmp_path):
    assert _right(_load(_saved(_state(base), tmp_path / "a.pt")), base)


@pytest.mark.parametrize("name", ("a.pt", "a.safetensors"))
def test_of_a_whole_model_only_the_prompts_and_the_head_are_taken(name, tmp_path):
    """The rest must be the model's own: nothing that was trained is left out."""
    from tests.support.tiny_models import make_tiny

    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "model", hidden=HIDDEN, blocks=BLOCKS)))
    whole = {"model.embed_tokens.weight": local.embeddings.weight.clone(), "lm_head.weight": local.lm_head.clone()}

    def load(state, checkpoint=local.checkpoint):
        path = str(_saved(state, tmp_path / name))
        return load_adapter(path, family=local.family, config=local.config, checkpoint=checkpoint)

    adapter = load(whole | _state())
    assert _right(adapter) and set(adapter.unused) == set(whole)
    assert adapter.sha256 == load(_state()).sha256
    trained = whole | {"model.embed_tokens.weight": local.embeddings.weight + 1e-3}
    for state, checkpoint in ((trained, local.checkpoint), (whole, None)):
        with pytest.raises(AdapterError, match=r"(lm_head|embed_tokens)\.weight, which an evaluation would leave out"):
            load(state | _state(), checkpoint)


def test_a_whole_model_in_shards(tmp_path):
    state = _state()
    weight_map = {}
    for number, (key, tensor) in enumerate(state.items()):
        weight_map[key] = f"model-{number}.safetensors"
        save_file({key: tensor}, tmp_path / weight_map[key])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert _right(_load(tmp_path))


def test_training_leftovers_are_not_taken_for_a_checkpoint(tmp_path):
    _saved(_state(), tmp_path / "prompts.pt")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"not opened")
    assert _right(_load(tmp_path))


def test_a_training_checkpoint_holds_its_state_dict_one_level_down(tmp_path):
    assert _right(_load(_saved({"epoch": 3, "model_state_dict": _state()}, tmp_path / "a.pt")))


def _embedding(weight: torch.Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weight, freeze=False)


def test_the_old_recipe_of_pickled_modules(tmp_path):
    state = _state("")
    score = nn.Linear(HIDDEN, LABELS, bias=False)
    score.weight = nn.Parameter(state["score.weight"])
    modules = {
        "prompt_embeddings": _embedding(state["prompt_embeddings.weight"]),
        "intermediate_prompt_embeddings": _embedding(state["intermediate_prompt_embeddings.weight"]),
        "score": score,
    }
    assert _right(_load(_saved(modules, tmp_path / "a.pt")), "")
    one = _load(_saved(modules["prompt_embeddings"], tmp_path / "one.pt"))
    assert one.kind == "ptune" and torch.equal(one.prompts, state["prompt_embeddings.weight"])
    assert not one.prompts.requires_grad


def test_the_old_recipe_of_two_pickles_in_one_file(tmp_path):
    """As found in the wild: torch.save(prompts, f); torch.save(deep_prompts, f)."""
    state = _state("")
    # A tensor that holds the mark of an archive's end must not be taken for one.
    state["prompt_embeddings.weight"][0].view(torch.uint8)[:4] = torch.tensor(list(b"PK\x05\x06"), dtype=torch.uint8)
    with (tmp_path / "prompts.pt").open("wb") as file:
        torch.save(_embedding(state["prompt_embeddings.weight"]), file)
        torch.save(_embedding(state["intermediate_prompt_embeddings.weight"]), file)
    adapter = _load(tmp_path / "prompts.pt")
    assert adapter.kind == "deep_ptune"
    assert torch.equal(adapter.prompts, state["prompt_embeddings.weight"])
    assert torch.equal(adapter.deep_prompts[2, 0], state["intermediate_prompt_embeddings.weight"][:, 2 * HIDDEN :])


class _Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _OwnEmbedding(nn.Embedding):
    pass


@pytest.mark.parametrize("new_format", (True, False))
@pytest.mark.parametrize("where", ("alone", "among tensors", "in a module"))
def test_a_malicious_pickle_runs_nothing(where, new_format, tmp_path):
    marker = tmp_path / "marker"
    attack = _Calls(Path.touch, marker)
    if where == "among tensors":
        attack = _state() | {"extra": attack}
    elif where == "in a module":
        module = nn.Embedding(PREFIX, HIDDEN)
        module.extra = attack
        attack = module
    torch.save(attack, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(AdapterError, match=r"(?s)a\.pt is refused: opening it would run code.*Save a state dict"):
        _load(tmp_path / "a.pt")
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the attack itself works
    assert marker.exists()


@pytest.mark.parametrize(
    ("attack", "named"),
    (
        (_Calls(eval, "1"), "eval"),
        (_Calls(getattr, nn.Embedding, "mro"), "getattr"),
        (_Calls(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        (_OwnEmbedding(2, 2), "_OwnEmbedding"),
        (nn.Sequential(nn.Embedding(2, 2)), "Sequential"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_pickle_asked_for_is_named(attack, named, tmp_path):
    with pytest.raises(AdapterError, match=named):
        _load(_saved({"a": attack}, tmp_path / "a.pt"))


def test_missing_prompts_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(AdapterError) as caught:
        _load(_saved({"score.weight": torch.ones(LABELS, HIDDEN)}, tmp_path / "a.bin"))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'a.bin'} has no prompt embeddings for a Llama.",
        "  expected  model.prompt_embeddings.weight  (prefix tokens, 16)",
        "            and for deep prompts model.intermediate_prompt_embeddings.weight  (prefix tokens, 3 * 16)",
        "  found     score.weight (2, 16)",
        "  Give a checkpoint that holds the tuned prompts, or leave the adapter out.",
    ]
    assert caught.value.exit_code == 2


def test_lora_is_sent_to_the_servers(tmp_path):
    state = {"score.weight": torch.ones(2, HIDDEN), "model.layers.0.q_proj.lora_A.default.weight": torch.ones(8, 16)}
    with pytest.raises(AdapterError, match=r"(?s)lora_A.default.weight \(8, 16\).*name it with --active-adapter"):
        _load(_saved(state, tmp_path / "a.bin"))


def test_prompts_of_another_family_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="another family"):
        _load(_saved(_state("transformer."), tmp_path / "a.pt"))


def test_deep_prompts_alone_are_refused(tmp_path):
    state = _state()
    del state["model.prompt_embeddings.weight"]
    with pytest.raises(AdapterError, match=r"has no prompt embeddings"):
        _load(_saved(state, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    (
        ("model.prompt_embeddings.weight", torch.ones(4, 32), r"\(prefix tokens, 16\)\n  found     \(4, 32\)"),
        ("model.prompt_embeddings.weight", torch.ones(16), r"found     \(16,\)"),
        ("model.prompt_embeddings.weight", torch.ones(0, 16), r"found     \(0, 16\)"),
        ("model.prompt_embeddings.weight", torch.ones(64, 16), "leaves no room for text: the model reads 64"),
        ("model.prompt_embeddings.weight", torch.ones(4, 16, dtype=torch.int64), "is torch.int64; expected floating"),
        (
            "model.intermediate_prompt_embeddings.weight",
            torch.ones(4, 2 * 16),
            r"\(4, 3 \* 16 = 48\)\n  found     \(4, 32\)",
        ),
        ("model.intermediate_prompt_embeddings.weight", torch.ones(5, 3 * 16), "for 5 prefix tokens.*are 4"),
        ("score.weight", torch.ones(2, 8), r"score\.weight has the wrong shape(?s:.*)\(labels, 16\)"),
        ("score.bias", torch.ones(3), r"score\.bias has the wrong shape(?s:.*)\(2,\)"),
        ("score.weight", torch.full((2, 16), torch.inf), "score.weight holds 32 values that are not finite"),
    ),
)
def test_misshapen_tensors_are_refused(key, value, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        _load(_saved(_state() | {key: value}, tmp_path / "a.pt"))


def test_one_nan_is_enough(tmp_path):
    state = _state()
    state["model.intermediate_prompt_embeddings.weight"][1, 7] = torch.nan
    with pytest.raises(
        AdapterError, match=r"intermediate_prompt_embeddings\.weight holds 1 values that are not finite"
    ):
        _load(_saved(state, tmp_path / "a.pt"))


def test_half_precision_prompts_become_float32(tmp_path):
    adapter = _load(_saved({key: value.half() for key, value in _state().items()}, tmp_path / "a.pt"))
    assert adapter.prompts.dtype == adapter.deep_prompts.dtype == torch.float32
    assert adapter.head_weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b"", "cannot be read"),
        (b"hello", "cannot be read"),
        (b"PK\x03\x04 but no more", "cannot be read"),
    ),
)
@pytest.mark.parametrize("suffix", (".pt", ".safetensors"))
def test_damaged_files_are_refused(content, message, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        _load(path)


def test_a_cut_file_is_refused(tmp_path):
    path = _saved(_state(), tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AdapterError, match="is the file complete"):
        _load(path)


def test_a_list_is_no_state_dict(tmp_path):
    with pytest.raises(AdapterError, match="holds a list; expected a state dict"):
        _load(_saved([["prompts"]], tmp_path / "a.pt"))


def test_folders_without_or_with_several_checkpoints(tmp_path):
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(AdapterError, match=r"(?s)holds no adapter.*found     notes\.txt"):
        _load(tmp_path)
    _saved(_state(), tmp_path / "a.pt")
    _saved(_state(), tmp_path / "b.pt")
    with pytest.raises(AdapterError, match=r"several checkpoints: a\.pt, b\.pt"):
        _load(tmp_path)


def test_a_missing_path_is_refused():
    with pytest.raises(AdapterError, match=r"no folder \./missing"):
        load_adapter("./missing", family=FAMILIES["llama"], config=CONFIG)


def test_the_hash_is_of_the_values_not_of_the_file(tmp_path):
    first = _load(_saved(_state(), tmp_path / "x/a.pt"))
    assert first.sha256 == _load(_saved(_state(), tmp_path / "y/b.safetensors")).sha256
    other = _state()
    other["score.weight"][0, 0] += 1e-3
    assert first.sha256 != _load(_saved(other, tmp_path / "c.pt")).sha256
    # The same on every machine: names, shapes, dtypes and little-endian bytes.
    plain = Adapter("a", "ptune", prompts=torch.tensor([[1.0, 2.0]]))
    written = b"prompts (1, 2) torch.float32\n" + struct.pack("<2f", 1, 2)
    assert plain.sha256 == hashlib.sha256(written).hexdigest()


def test_the_head_alone_for_comparison(tmp_path):
    adapter = _load(_saved(_state(), tmp_path / "a.pt"))
    bare = adapter.without_prompts()
    assert bare.kind == "none" and bare.prefix_length == 0 and bare.deep_prompts is None
    assert torch.equal(bare.head_weight, adapter.head_weight) and bare.sha256 != adapter.sha256


@pytest.mark.parametrize(
    ("name", "kind", "prefix", "labels"),
    (
        ("trec-deep_ptune", "deep_ptune", 8, 6),
        ("trec-ptune", "ptune", 16, 6),
        ("sst2-deep_ptune", "deep_ptune", 8, 2),
        ("trec-ptune-peft", "peft-prompt_tuning", 16, 6),
    ),
)
def test_the_real_adapters(realdata, name, kind, prefix, labels):
    config = SimpleNamespace(**json.loads((realdata / "stories260K-hf/config.json").read_text()))
    adapter = _load(realdata / "adapters" / name, config=config)
    assert (adapter.kind, adapter.prefix_length, adapter.name) == (kind, prefix, name)
    assert tuple(adapter.prompts.shape) == (prefix, 64)
    assert tuple(adapter.head_weight.shape) == (labels, 64)
    assert (adapter.deep_prompts is not None) == (kind == "deep_ptune")
    if adapter.deep_prompts is not None:
        assert tuple(adapter.deep_prompts.shape) == (5, 1, prefix, 64)


def test_one_adapter_in_two_formats_has_one_hash(realdata):
    config = SimpleNamespace(**json.loads((realdata / "stories260K-hf/config.json").read_text()))
    petals, peft = (_load(realdata / "adapters" / name, config=config) for name in ("trec-ptune", "trec-ptune-peft"))
    assert petals.sha256 == peft.sha256

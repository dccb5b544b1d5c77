"""No tensor of a checkpoint is left out without a word: it is used, known to be harmless, or an error with its name."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from petals_eval.errors import AdapterError, ModelError
from petals_eval.model import FAMILIES, LocalModel, load_adapter
from petals_eval.model.tensor_roles import Role, role_of
from tests.model.reference import classifier, full_logits, local_answers
from tests.support.tensors import close
from tests.support.tiny_models import CLASSIFIED, make_tiny
from tests.support.tiny_models import FAMILIES as NAMES

HIDDEN, BLOCKS, PREFIX, LABELS = 32, 3, 4, 3


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=("llama", "bloom"))
def model(request, tmp_path_factory):
    """A classifier of its own, with the folder beside it: the head in an adapter must win over this one."""
    folder = make_tiny(request.param, tmp_path_factory.mktemp("models") / request.param, labels=LABELS)
    return LocalModel.from_pretrained(str(folder)), folder


def petals_state(local):
    return {
        f"{local.family.base}.prompt_embeddings.weight": noise(PREFIX, HIDDEN),
        f"{local.family.base}.intermediate_prompt_embeddings.weight": noise(PREFIX, BLOCKS * HIDDEN, seed=1),
    }


def petals_file(tmp_path, local, **tensors):
    torch.save(petals_state(local) | tensors, tmp_path / "prompts.pt")
    return str(tmp_path / "prompts.pt")


def peft_folder(tmp_path, tensors, name="peft", **config):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": PREFIX, "token_dim": HIDDEN}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file({"prompt_embeddings": noise(PREFIX, HIDDEN)} | tensors, folder / "adapter_model.safetensors")
    return str(folder)


def load(path, local):
    return load_adapter(path, family=local.family, config=local.config, checkpoint=local.checkpoint)


HEADS = (
    "score",
    "classifier",
    "model.score",
    "module.score",
    "base_model.score",
    "base_model.model.score",
    "score.modules_to_save",
    "score.modules_to_save.default",
    "base_model.model.score.modules_to_save.sst2-v1",
    "base_model.model.score.modules_to_save.sst2.v1",
    "base_model.model.classifier.modules_to_save.my_run 2",
)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("saved_by", ("petals", "peft"))
def test_a_head_is_found_under_any_adapters_name_and_used(saved_by, name, bias, model, tmp_path):
    local, folder = model
    tensors = {f"{name}.weight": noise(LABELS, HIDDEN, seed=2)}
    if bias:
        tensors[f"{name}.bias"] = noise(LABELS, seed=3)
    path = petals_file(tmp_path, local, **tensors) if saved_by == "petals" else peft_folder(tmp_path, tensors)
    adapter = load(path, local)
    assert torch.equal(adapter.head_weight, tensors[f"{name}.weight"]) and adapter.unused == ()
    whole = classifier(folder)
    whole.score = torch.nn.Linear(HIDDEN, LABELS, bias=bias)
    with torch.no_grad():
        whole.score.weight.copy_(tensors[f"{name}.weight"])
        if bias:
            whole.score.bias.copy_(tensors[f"{name}.bias"])
    from petals_eval.tasks.requests import Request

    request = Request("0", 0, (1, 75, 86))
    [answer] = local_answers(whole, local, adapter, [request])
    assert close(answer, full_logits(whole, local, adapter, request.input_ids))


LEFT_OUT = (
    ("score.0.weight", "no module of that name"),
    ("base_model.model.score.0.weight", "no module of that name"),
    ("base_model.model.score.modules_to_save.default.2.weight", "no module of that name"),
    ("base_model.model.classification_head.weight", "no module of that name"),
    ("score.dense.weight", "no module of that name"),
    ("base_model.model.lm_head.modules_to_save.default.weight", "not equal to the model's own"),
    ("base_model.model.model.embed_tokens.weight", "not equal|no module"),
    ("prompt_encoder.mlp_head.0.weight", "no module of that name"),
    ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "LoRA runs inside the blocks"),
    ("score.modules_to_save.default.lora_A.weight", "LoRA runs inside the blocks"),
    ("score.original_module.weight", "a head from before its training, and the trained one is not there"),
)


@pytest.mark.parametrize(("name", "why"), LEFT_OUT)
@pytest.mark.parametrize("saved_by", ("petals", "peft"))
def test_a_trained_tensor_that_would_be_left_out_is_an_error_with_its_name(saved_by, name, why, model, tmp_path):
    local, _ = model
    tensors = {name: noise(LABELS, HIDDEN, seed=2)}
    path = petals_file(tmp_path, local, **tensors) if saved_by == "petals" else peft_folder(tmp_path, tensors)
    with pytest.raises(AdapterError, match=rf"holds {name}, which an evaluation would leave out: .*({why})"):
        load(path, local)


def test_two_heads_and_a_bias_alone_are_refused(model, tmp_path):
    local, _ = model
    two = {"score.weight": noise(LABELS, HIDDEN), "model.score.weight": noise(LABELS, HIDDEN)}
    with pytest.raises(AdapterError, match=r"more than one head: model\.score\.weight, score\.weight"):
        load(petals_file(tmp_path, local, **two), local)
    with pytest.raises(AdapterError, match=r"holds score\.bias without the weight"):
        load(petals_file(tmp_path, local, **{"score.bias": noise(LABELS)}), local)


def test_what_petals_and_peft_keep_beside_is_harmless_and_named(model, tmp_path):
    """A whole model's state dict; the head as it was; counts; buffers."""
    local, folder = model
    own = load_file(folder / "model.safetensors")
    block = next(name for name in own if f".{local.family.blocks}.1." in name)
    local_keys = [name for name in own if role_of(name, local.family) is Role.LOCAL]
    assert len(local_keys) >= 2
    for cast in (torch.float32, torch.bfloat16):
        same = {name: own[name].to(cast) for name in (*local_keys, block)}
        same[f"{local.family.base}.layers.0.self_attn.rotary_emb.inv_freq"] = noise(4)
        same |= {"score.weight": noise(LABELS, HIDDEN), "score.original_module.weight": noise(LABELS, HIDDEN)}
        adapter = load(petals_file(tmp_path, local, **same, global_step=torch.tensor(3)), local)
        assert set(adapter.unused) == {*same, "global_step"} - {"score.weight"}


@pytest.mark.parametrize("what", ("embeddings", "norm", "block", "rows"))
def test_a_part_of_the_model_that_was_trained_too_is_an_error(what, model, tmp_path):
    local, folder = model
    own = load_file(folder / "model.safetensors")
    part = {
        "embeddings": f".{local.family.embeddings}.",
        "norm": f".{local.family.final_norm}.",
        "block": f".{local.family.blocks}.1.",
        "rows": f".{local.family.embeddings}.",
    }[what]
    name = next(each for each in own if part in f".{each}")
    changed = own[name].clone()
    changed.view(-1)[-1] += 0.5
    if what == "rows":  # a vocabulary that was made larger
        changed = torch.cat([own[name], own[name][:2]])
    with pytest.raises(AdapterError, match=f"holds {name}, which an evaluation would leave out"):
        load(petals_file(tmp_path, local, **{name: changed}), local)


def test_weights_of_blocks_cannot_be_held_against_a_model_that_is_elsewhere(model, tmp_path, monkeypatch):
    """They would have to be downloaded, all of them."""
    local, folder = model
    own = load_file(folder / "model.safetensors")
    block = next(name for name in own if f".{local.family.blocks}.1." in name)
    monkeypatch.setattr(type(local.checkpoint), "is_folder", False)
    with pytest.raises(AdapterError, match=f"holds {block}, .*cannot be held against the model's own"):
        load(petals_file(tmp_path, local, **{block: own[block]}), local)


def test_tensors_beside_a_state_dict_are_not_overlooked(model, tmp_path):
    local, _ = model
    state = petals_state(local)
    torch.save({"state_dict": state, "head": {"weight": noise(LABELS, HIDDEN)}}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=r"holds head\.weight, which"):
        load(str(tmp_path / "a.pt"), local)
    torch.save({"state_dict": state, "score.weight": noise(LABELS, HIDDEN)}, tmp_path / "b.pt")
    assert load(str(tmp_path / "b.pt"), local).head_weight is not None
    optimizer = {"state": {0: {"exp_avg": noise(4, 4)}}, "param_groups": []}
    torch.save({"model": state, "optimizer": optimizer, "epoch": 3}, tmp_path / "c.pt")
    assert load(str(tmp_path / "c.pt"), local).unused == ()
    torch.save(state | {"score.weight": noise(LABELS, HIDDEN).to_sparse()}, tmp_path / "d.pt")
    with pytest.raises(AdapterError, match=r"score\.weight is a tensor on cpu in layout torch\.sparse_coo"):
        load(str(tmp_path / "d.pt"), local)


KNOWN = st.sampled_from([*HEADS, "x.rotary_emb.inv_freq", "score.original_module"])
PARTS = st.sampled_from(
    (
        *("model", "base_model", "score", "classifier", "head", "0", "12", "default", "modules_to_save", "lora_A"),
        *(
            "embed_tokens",
            "layers",
            "h",
            "norm",
            "ln_f",
            "lm_head",
            "prompt_embeddings",
            "v_head",
            "original_module",
            "ä",
        ),
    )
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    head=st.none() | st.sampled_from(HEADS),
    extra=st.lists(st.lists(PARTS, min_size=1, max_size=6).map(".".join) | KNOWN, max_size=3),
    parameter=st.sampled_from(["weight", "bias", "weights", "inv_freq"]),
)
def test_random_extra_tensors(head, extra, parameter, model, tmp_path):
    """Whatever is there beside the prompts: the head is the one that was saved, or an error names a tensor; what is
    left out is named, and no head is among it."""
    local, _ = model
    tensors = {} if head is None else {f"{head}.weight": noise(LABELS, HIDDEN, seed=2)}
    tensors |= {f"{name}.{parameter}": noise(LABELS, HIDDEN, seed=4) for name in extra}
    tensors = {name: value for name, value in tensors.items() if name not in petals_state(local)}
    try:
        adapter = load(petals_file(tmp_path, local, **tensors), local)
    except AdapterError as error:
        assert any(name in str(error) for name in tensors)
        return
    taken = set(tensors) - set(adapter.unused)
    assert len(taken) <= 2 and all(role_of(name, local.family) is Role.HEAD for name in taken)
    if head is not None:
        assert torch.equal(adapter.head_weight, tensors[f"{head}.weight"])
    harmless = {Role.NO_EFFECT, Role.EARLIER_HEAD}
    assert all(role_of(name, local.family) in harmless for name in adapter.unused)


# -- the model's own checkpoint


def with_tensors(folder, tmp_path, **tensors):
    """A copy of a model's folder with these tensors beside its own."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    save_file(load_file(folder / "model.safetensors") | tensors, copy / "model.safetensors")
    return LocalModel.from_pretrained(str(copy))


@pytest.mark.parametrize("family", NAMES)
def test_every_tensor_of_every_familys_checkpoint_has_a_role(family, tmp_path):
    for labels in (None, LABELS) if family in CLASSIFIED else (None,):
        folder = make_tiny(family, tmp_path / str(labels), labels=labels)
        names = list(load_file(folder / "model.safetensors"))
        roles = {name: role_of(name, FAMILIES[family]) for name in names}
        assert set(roles.values()) <= {Role.LOCAL, Role.BLOCK, Role.HEAD}
        assert LocalModel.from_pretrained(str(folder)).unused == ()


def test_a_bias_of_the_models_own_head_is_used(model, tmp_path):
    _, folder = model
    bias = noise(LABELS, seed=5)
    local = with_tensors(folder, tmp_path, **{"score.bias": bias})
    hidden = noise(2, HIDDEN)
    expected = torch.nn.functional.linear(hidden, load_file(folder / "model.safetensors")["score.weight"], bias)
    assert torch.equal(local._class_logits(hidden, None), expected)


def test_a_tensor_that_nobody_knows_is_an_error_with_its_name(model, tmp_path):
    local, folder = model
    for name in ("lm_head.bias", f"{local.family.base}.embed_positions.weight", "adapter.down.weight"):
        with pytest.raises(ModelError, match=rf"hold {name}, which is no known part of a {local.family.title}"):
            with_tensors(folder, tmp_path, **{name: noise(LABELS, HIDDEN)})


def test_a_head_of_another_form_is_refused_where_the_models_own_is_asked_for(model, tmp_path):
    local = with_tensors(model[1], tmp_path, **{"classification_head.dense.weight": noise(HIDDEN, HIDDEN)})
    with pytest.raises(ModelError, match=r"hold classification_head\.dense\.weight: a trained head, it seems"):
        local.check_head("class", None)
    adapter = load(petals_file(tmp_path, local, **{"score.weight": noise(LABELS, HIDDEN)}), local)
    local.check_head("class", adapter)


def test_what_no_answer_needs_is_named(model, tmp_path):
    local, folder = model
    block = next(name for name in load_file(folder / "model.safetensors") if f".{local.family.blocks}.0." in name)
    beyond = block.replace(".0.", f".{BLOCKS}.", 1)
    tensors = {"v_head.summary.weight": noise(1, HIDDEN), beyond: noise(HIDDEN, HIDDEN)}
    assert set(with_tensors(folder, tmp_path, **tensors).unused) == set(tensors)

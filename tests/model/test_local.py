import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from petals_eval.data.batching import MicroBatch
from petals_eval.errors import AdapterError, ModelError, RequestTooLargeError
from petals_eval.model import Adapter, LocalModel, evaluating, load_adapter
from petals_eval.model import local as local_module
from petals_eval.tasks.requests import Request
from tests.model.reference import TOKENS, causal_lm, make_adapter, run_blocks
from tests.support.tiny_models import FAMILIES, make_tiny


@pytest.fixture
def tiny(tmp_path) -> LocalModel:
    return LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "tiny")))


def _batch(*targets: tuple[int, int]) -> MicroBatch[Request]:
    return MicroBatch.of([Request("0", 0, TOKENS, targets)])


def test_everything_is_frozen_and_in_eval_mode(tiny):
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    assert not any(module.training for module in tiny.modules())
    assert (tiny.num_blocks, tiny.hidden_size, tiny.family.model_type) == (3, 32, "llama")
    assert not tiny.embed(torch.tensor([TOKENS])).requires_grad


def test_a_tied_head_is_held_once(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("bloom", tmp_path)))
    assert local.lm_head is local.embeddings.weight
    assert local.to(torch.float64).lm_head is local.embeddings.weight


def test_a_head_that_differs_in_spite_of_the_config_is_used_as_hugging_face_does(tmp_path):
    make_tiny("llama", tmp_path, tied=True)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    local = LocalModel.from_pretrained(str(tmp_path))
    assert torch.equal(local.lm_head, state["lm_head.weight"])
    assert torch.equal(local.lm_head, causal_lm(tmp_path).lm_head.weight)


def test_the_dtype_is_the_configs_the_stored_one_or_the_callers(tmp_path):
    folder = str(make_tiny("qwen2", tmp_path, dtype=torch.bfloat16))
    assert LocalModel.from_pretrained(folder).dtype == torch.bfloat16
    wide = LocalModel.from_pretrained(folder, dtype=torch.float32)
    assert wide.dtype == wide.norm.weight.dtype == torch.float32
    assert wide.embed(torch.tensor([TOKENS])).dtype == torch.float32
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16",', ""))
    assert LocalModel.from_pretrained(folder).dtype == torch.bfloat16
    config.write_text(config.read_text().replace("{", '{"torch_dtype": "float16",', 1))
    assert LocalModel.from_pretrained(folder).dtype == torch.float16


def test_the_last_hidden_state_is_cast_before_norm_and_head(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=3)))
    hidden = torch.randn(1, len(TOKENS), 32).bfloat16()
    from_float32 = local.head(hidden.float(), _batch())
    assert torch.equal(local.head(hidden, _batch())[0], from_float32[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_home_rounds_as_hugging_face_does(family, tmp_path):
    """To the bit, in bfloat16: where a norm casts back, and what a scale of embeddings is rounded to, shows there."""
    folder = make_tiny(family, tmp_path, dtype=torch.bfloat16)
    local, base = LocalModel.from_pretrained(str(folder)), causal_lm(folder).base_model
    hidden, ids = 3 * torch.randn(2, 9, 32).bfloat16(), torch.tensor([TOKENS])
    assert torch.equal(local.norm(hidden), getattr(base, local.family.final_norm)(hidden))
    embedded = getattr(base, local.family.embeddings)(ids)
    if local.family.embedding_norm:
        embedded = getattr(base, local.family.embedding_norm)(embedded)
    assert torch.equal(local.embed(ids), embedded)


def test_prompts_take_the_embeddings_dtype(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, dtype=torch.bfloat16)))
    adapter = make_adapter(local, "ptune")
    hidden = local.embed(torch.tensor([TOKENS, TOKENS]), adapter)
    assert hidden.dtype == torch.bfloat16 and hidden.shape == (2, 4 + len(TOKENS), 32)
    assert torch.equal(hidden[1, :4], adapter.prompts.bfloat16())


def test_the_adapters_head_comes_before_the_checkpoints(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=3)))
    hidden = torch.randn(1, len(TOKENS), 32)
    assert local.head(hidden, _batch())[0].shape == (3,)
    adapter = make_adapter(local, "none", labels=5)
    plain = local.head(hidden, _batch(), adapter)[0]
    assert plain.shape == (5,)
    shifted = Adapter("b", "none", head_weight=adapter.head_weight, head_bias=torch.arange(5.0))
    assert torch.allclose(local.head(hidden, _batch(), shifted)[0], plain + torch.arange(5.0))


def test_without_a_class_head_the_error_says_what_is_expected(tiny):
    with pytest.raises(
        AdapterError, match=r"(?s)expected  score\.weight \(labels, 32\).*found     none in random.*tiny"
    ):
        tiny.head(torch.randn(1, 4 + len(TOKENS), 32), _batch(), make_adapter(tiny, "ptune"))


def test_an_lm_head_is_missed_only_when_it_is_needed(tmp_path):
    local = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path, labels=3)))
    hidden = torch.randn(1, len(TOKENS), 32)
    assert local.head(hidden, _batch())[0].shape == (3,)
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        local.head(hidden, _batch((0, 5)))


def test_long_heads_are_computed_in_slices(tiny, monkeypatch):
    batch = _batch(*[(position, token) for position in range(len(TOKENS)) for token in (7, 250)])
    hidden = torch.randn(1, len(TOKENS), 32)
    whole = tiny.head(hidden, batch)[0]
    monkeypatch.setattr(local_module, "_LOGITS_AT_ONCE", 2 * 320)
    assert torch.allclose(tiny.head(hidden, batch)[0], whole)


def test_the_normaliser_that_writes_over_logits_is_logsumexp_to_the_bit():
    logits = 20 * torch.randn(9, 3000)
    logits[0], logits[1, 5] = 0.0, -torch.inf
    assert torch.equal(local_module._logsumexp_over(logits.clone()), logits.logsumexp(-1))


def test_answers_do_not_depend_on_the_batch(tmp_path):
    folder = make_tiny("bloom", tmp_path)
    local, model = LocalModel.from_pretrained(str(folder)), causal_lm(folder)
    adapter = make_adapter(local, "deep_ptune", labels=2)
    requests = [Request("a", 0, TOKENS), Request("b", 0, TOKENS[:4], ((3, 9), (0, 2))), Request("c", 0, TOKENS[:2])]

    def answer(*chosen: Request) -> list[torch.Tensor]:
        batch = MicroBatch.of(chosen)
        return local.head(run_blocks(model, local, local.embed(batch.input_ids, adapter), adapter), batch, adapter)

    together = answer(*requests)
    assert [tuple(each.shape) for each in together] == [(2,), (2,), (2,)]
    for request, found in zip(requests, together, strict=True):
        assert torch.allclose(answer(request)[0], found, atol=1e-5)


def test_the_context_is_checked_with_the_prompts(tiny):
    tiny.check_length(tokens=504, prefix=8)
    with pytest.raises(
        RequestTooLargeError, match=r"8 prompt tokens and 505 tokens.*reads 512.*504 tokens of text at most"
    ):
        tiny.check_length(tokens=505, prefix=8)


def test_alibi_has_no_context_limit(tmp_path):
    LocalModel.from_pretrained(str(make_tiny("bloom", tmp_path))).check_length(10**6, 8)


def test_tokens_of_another_tokenizer_are_refused(tiny):
    with pytest.raises(ModelError, match=r"0 to 319"):
        tiny.embed(torch.tensor([[1, 320]]))


def test_prompts_of_another_width_are_refused(tiny):
    wrong = Adapter("wide", "ptune", prompts=torch.zeros(2, 64), head_weight=torch.zeros(2, 64))
    with pytest.raises(AdapterError, match="64 wide; expected 32"):
        tiny.embed(torch.tensor([TOKENS]), wrong)


def test_hidden_states_of_another_shape_are_refused(tiny):
    with pytest.raises(ModelError, match=r"expected \(1, 9, 32\)"):
        tiny.head(torch.zeros(1, 8, 32), _batch((0, 1)))


@pytest.mark.parametrize("target", ((9, 0), (-1, 0), (0, 320), (0, -1)))
def test_a_target_out_of_range_is_refused(tiny, target):
    with pytest.raises(ModelError, match="out of range"):
        tiny.head(torch.zeros(1, 9, 32), _batch(target))


def test_the_real_model_reads_trec_as_its_readme_says(realdata):
    """All 500 questions, with the blocks of Hugging Face in the place of a swarm."""
    local = LocalModel.from_pretrained(str(realdata / "stories260K-hf"))
    model = causal_lm(realdata / "stories260K-hf")
    lines = (realdata / "trec/TREC.test.all").read_text("latin-1").splitlines()
    for name, right in (("trec-deep_ptune", 368), ("trec-ptune", 359), ("trec-ptune-peft", 359)):
        adapter = load_adapter(str(realdata / "adapters" / name), family=local.family, config=local.config)
        found = 0
        for start in range(0, len(lines), 50):
            labels, texts = zip(*(line.split(" ", 1) for line in lines[start : start + 50]), strict=True)
            tokens = local.tokenizer(list(texts), truncation=True, max_length=96).input_ids
            batch = MicroBatch.of([Request(str(key), 0, tuple(ids)) for key, ids in enumerate(tokens)])
            with evaluating(local, model):
                hidden = run_blocks(model, local, local.embed(batch.input_ids, adapter), adapter)
                answers = local.head(hidden, batch, adapter)
            found += sum(int(answer.argmax()) == int(label) for answer, label in zip(answers, labels, strict=True))
        assert found == right, name


def test_the_names_of_the_outputs_are_those_of_the_head_that_is_used(tmp_path):
    names = {0: "bad", 1: "good", 2: "fine"}
    named = LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "named", labels=3, id2label=names)))
    assert named.own_label_names(None) == ("bad", "good", "fine")
    assert named.own_label_names(make_adapter(named, "ptune")) == ("bad", "good", "fine")
    assert named.own_label_names(make_adapter(named, "ptune", labels=3)) is None
    assert (
        LocalModel.from_pretrained(str(make_tiny("llama", tmp_path / "plain", labels=3))).own_label_names(None) is None
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"problem_type": "multi_label_classification"},
            "tiny says problem_type: multi_label_classification: .* is not",
        ),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "tiny is a LlamaForTokenClassification: .* for whole texts",
        ),
    ],
)
def test_a_head_for_several_labels_or_for_tokens_is_refused_with_the_reason(config, said, tmp_path):
    folder = make_tiny("llama", tmp_path / "tiny", labels=3)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    local = LocalModel.from_pretrained(folder)
    with pytest.raises(ModelError, match=said):
        local.check_head("class", None)
    # Of an adapter that brings its own head nothing is known but that; and the word head is another one.
    local.check_head("class", make_adapter(local, "ptune", labels=3))
    with pytest.raises(ModelError, match=said):
        local.check_head("class", make_adapter(local, "ptune"))


@pytest.mark.parametrize("problem", [None, "single_label_classification", "regression"])
def test_a_head_for_one_answer_is_taken(problem, tmp_path):
    folder = make_tiny("llama", tmp_path / "tiny", labels=3, problem_type=problem)
    LocalModel.from_pretrained(folder).check_head("class", None)

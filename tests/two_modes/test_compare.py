"""What training mode changes, on models whose answer to that is known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import petals_eval
from petals_eval.demo import demo_paths, export_demo
from petals_eval.errors import ConfigError, ModelError
from petals_eval.two_modes.at_home import on_task
from petals_eval.two_modes.settings import ModesSettings
from tests.cli.invoking import invoke

IDS = torch.tensor([[5, 7, 11, 2, 9, 4]])


def small(kind: str, dropout: float, **more: Any) -> nn.Module:
    size: dict[str, Any] = {"vocab_size": 64, "num_labels": 3, "pad_token_id": 0}
    if kind == "bert":
        config: Any = transformers.BertConfig(
            **size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **more,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **size, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout
        )
        return transformers.GPT2ForSequenceClassification(config)
    config = transformers.LlamaConfig(
        **size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, attention_dropout=dropout,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_dropout_moves_answers_in_training_mode_alone(kind: str) -> None:
    model = small(kind, 0.1).train()
    found = petals_eval.modes(model, {"input_ids": IDS}, answers=4)
    assert {each.p for each in found.behaviours if each.is_active} == {0.1}
    assert len({each.top_logit for each in found.training}) > 1
    assert found.training[1].from_first > 0
    assert found.training[0].from_first == 0
    assert found.training[0].from_mean > 0
    assert {(each.top_logit, each.from_first, each.from_mean) for each in found.evaluation} == {
        (found.evaluation[0].top_logit, 0.0, 0.0)
    }
    assert found.is_deterministic
    assert found.gradients.is_equal
    assert found.gradients.bytes_kept > 0
    assert "" in found.was_training
    assert model.training


def test_a_model_whose_dropouts_are_0_but_for_the_classifier() -> None:
    model = small("bert", 0.0, classifier_dropout=0.5)
    found = petals_eval.modes(model, {"input_ids": IDS})
    assert [each.path for each in found.behaviours if each.is_active] == ["dropout"]
    assert len(found.behaviours) > 1
    assert any(each.from_first > 0 for each in found.training)
    assert found.is_deterministic


def test_without_dropout_both_modes_say_the_same() -> None:
    found = petals_eval.modes(small("llama", 0.0), {"input_ids": IDS})
    assert not [each for each in found.behaviours if each.is_active]
    assert {each.top_logit for each in found.training} == {found.evaluation[0].top_logit}


def test_batch_norm_shows_what_it_would_have_learnt_and_keeps_nothing_of_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(16, 4) + 3
    found = petals_eval.modes(model, inputs)
    assert [(each.path, each.kind) for each in found.behaviours] == [("1", "batch norm")]
    [moved] = found.statistics
    hidden = model[0](inputs)
    assert moved.path == "1"
    assert moved.mean == pytest.approx(0.1 * hidden.mean(dim=0).abs().max().item(), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_what_is_not_deterministic_in_eval_mode_is_named() -> None:
    class Noise(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + torch.randn_like(hidden)

    found = petals_eval.modes(nn.Sequential(nn.Linear(4, 4), Noise(), nn.Linear(4, 3)), torch.ones(1, 4))
    assert found.differing == "1"
    assert not found.is_deterministic


def test_a_module_that_asks_for_gradients_by_itself_is_named() -> None:
    class Wilful(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(hidden)

    found = petals_eval.modes(nn.Sequential(Wilful(4, 4), nn.Identity()), torch.ones(1, 4))
    assert found.gradients.requires_grad[0] == "0"
    assert not found.is_deterministic


def test_what_a_metric_would_have_been_had_eval_been_forgotten() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(200, 8)
    with torch.no_grad():
        labels = model(inputs).argmax(dim=-1)
    found = petals_eval.modes(model, inputs[:1], batches=[(inputs[:120], labels[:120]), (inputs[120:], labels[120:])])
    assert found.forgotten is not None
    assert found.forgotten.in_eval == 1.0
    assert len(found.forgotten.in_training) == 10
    assert 0.2 < max(found.forgotten.in_training) < 1.0
    assert len(set(found.forgotten.in_training)) > 1


def test_random_state_and_modes_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5).eval(), nn.Linear(4, 3).train())
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    petals_eval.modes(model, torch.ones(1, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags


def test_prompts_in_half_precision_are_pointed_out() -> None:
    model = small("llama", 0.0).requires_grad_(False)
    model.prompts = nn.Parameter(torch.zeros(4, 32, dtype=torch.float16))
    assert petals_eval.modes(model, {"input_ids": IDS}).half_precision == ("prompts",)


def test_mistakes_are_said() -> None:
    with pytest.raises(ConfigError, match="answers: expected 2 or more"):
        petals_eval.modes(nn.Linear(2, 2), torch.ones(1, 2), answers=1)
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module, found str"):
        petals_eval.modes("model", torch.ones(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="expected an output with logits"):
        petals_eval.modes(nn.MSELoss(), [torch.ones(2), torch.ones(2)])


def test_the_command_on_a_folder(tmp_path: Path, realdata: Path) -> None:
    outcome = invoke("modes", "--model", realdata / "stories260K-hf", "--answers", 3)
    assert outcome.code == 0
    assert "eval mode: all 3 answers are equal bit for bit" in outcome.out
    model = small("gpt2", 0.1)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(str(realdata / "stories260K-hf")).save_pretrained(tmp_path)
    wrong = invoke("modes", "--model", tmp_path / "none")
    assert wrong.code == 2
    assert "expected a model of transformers" in wrong.error
    assert invoke("modes").code == 2


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_demo(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("exported")
def test_tuned_prompts_give_at_home_what_they_give_over_a_swarm() -> None:
    settings = {"model": "my-llama", "adapter": ("prompts", "early-prompts"), "task": "reviews.yaml"}
    asked = on_task(ModesSettings(**settings))
    expected = json.loads(demo_paths().expected.read_text())
    for name, key in (("prompts", "accuracy"), ("early-prompts", "accuracy_early")):
        model = asked.models[name].eval()
        with torch.no_grad():
            right = sum(int((model(ids).argmax(-1) == labels).sum()) for ids, labels in asked.batches)
        assert right / 400 == expected[key]
        asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert asking == {"prompts", "deep_prompts"}


@pytest.mark.usefixtures("exported")
def test_the_command_says_what_forgetting_eval_would_have_done_to_the_accuracy() -> None:
    asked = ("modes", "--model", "my-llama", "--adapter", "prompts", "--task", "reviews.yaml", "--limit", 60)
    outcome = invoke(*asked, "--dropout", 0.5, "--out", "modes.html")
    assert outcome.code == 0
    assert outcome.out.endswith("report: modes.html\n")
    page = Path("modes.html").read_text()
    assert page.count("<figure>") == 3 and "In eval mode all 5 answers are equal bit for bit" in page
    assert "modules that behave differently in training mode: 6\n" in outcome.out
    assert "blocks.layers.0.self_attn: LlamaAttention, dropout p=0.5" in outcome.out
    assert "eval mode: all 5 answers are equal bit for bit" in outcome.out
    assert re.search(r"had eval\(\) been forgotten: accuracy 0\.\d+ to \d\.\d+ over 10 passes, instead of", outcome.out)
    found = json.loads(invoke(*asked, "--json").out)["adapters"]["prompts"]
    assert set(found["forgotten"]["in_training"]) == {found["forgotten"]["in_eval"]}  # the demo's own dropout is 0
    assert found["gradients"]["bytes_kept"] > 0


@pytest.mark.usefixtures("exported")
def test_prompts_that_were_saved_in_half_precision_are_pointed_out() -> None:
    file = Path("prompts", "petals_state_dict.safetensors")
    saved = load_file(file)
    save_file({name: tensor.bfloat16() if "prompt" in name else tensor for name, tensor in saved.items()}, file)
    asked = ("--model", "my-llama", "--adapter", "prompts", "early-prompts", "--task", "reviews.yaml", "--limit", 8)
    found = json.loads(invoke("modes", *asked, "--json").out)["adapters"]
    assert found["prompts"]["half_precision"] == ["prompts", "deep_prompts"]
    assert found["early-prompts"]["half_precision"] == []


@pytest.mark.usefixtures("exported")
def test_what_cannot_be_answered_at_home_ends_with_code_2() -> None:
    assert "expected --task beside --adapter" in invoke("modes", "--model", "my-llama", "--adapter", "prompts").error
    words = invoke("modes", "--model", "my-llama", "--task", "words.yaml")
    assert words.code == 2 and "expected a classification by a trained head; words is another kind" in words.error
    assert "petals-eval health --html" in invoke("modes", "--initial-peers", "/ip4/x", "--out", "x.html").error
    bare = invoke("modes", "--model", "my-llama", "--task", "reviews.yaml")
    assert bare.code == 2 and "there is no trained head" in bare.error

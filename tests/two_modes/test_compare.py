"""What training mode changes, on models whose answer to that is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import petals_eval
from petals_eval.errors import ConfigError, ModelError

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
    from tests.cli.invoking import invoke

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

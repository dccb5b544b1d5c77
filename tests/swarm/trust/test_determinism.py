"""What is asked of a server, how answers are compared, and what that shows. No network."""

import math

import pytest
import torch

from petals_eval.swarm.trust.determinism import difference, dropout_in, question_from
from petals_eval.swarm.trust.tolerance import SAME_SERVER
from tests.support.tensors import hidden_states
from tests.support.tiny_models import make_tiny

SIZE = 64


def test_equal_bits_are_no_difference_and_dropout_is_as_large_as_its_formula_says():
    question, added = hidden_states(6, 16, SIZE), torch.randn(6, 16, SIZE)
    assert difference(question, question + added, question + added) == 0.0
    for p in (0.01, 0.1, 0.5):
        first, second = (question + torch.nn.functional.dropout(added, p) for _ in range(2))
        assert difference(question, first, second) == pytest.approx(math.sqrt(2 * p / (1 - p)), rel=0.35)


def test_a_small_contribution_to_large_hidden_states_is_judged_by_itself():
    """Deep in a model a block adds a hundredth, and a few channels are a thousand times as large as the rest."""
    question, added = 100 * hidden_states(6, 16, SIZE), torch.randn(6, 16, SIZE)
    question[..., 3] = 50_000
    first, second = (question + torch.nn.functional.dropout(added, 0.01) for _ in range(2))
    assert difference(question, first, second) > 0.08
    assert difference(question.bfloat16(), first.bfloat16(), second.bfloat16()) > 0.06
    last_bit = question + added
    last_bit[..., 3] += 256  # of bfloat16 at this size
    assert difference(question, question + added, last_bit) == 0


def test_answers_that_differ_where_nothing_was_done_are_infinitely_different():
    question = torch.zeros(1, 2, 8)
    assert difference(question, question + 1, question - 1) == math.inf


@pytest.mark.parametrize("dtype", SAME_SERVER)
@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
def test_the_tolerance_lies_between_rounding_and_dropout(family, dtype, tmp_path):
    """Rounding: the same blocks by two ways of computing attention, or on halves of the batch. Dropout: 0.01."""
    from transformers import AutoModel

    folder = make_tiny(family, tmp_path / family, hidden=SIZE, blocks=4)
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    final = "ln_f" if family == "bloom" else "norm"
    setattr(model, final, torch.nn.Identity())
    question = question_from(3 * hidden_states(4, 30, SIZE)).to(dtype)

    def ask():
        with torch.inference_mode():
            return model(inputs_embeds=question, use_cache=False).last_hidden_state

    fused = ask()
    assert torch.equal(ask(), fused)  # two calls, the same bits
    if family != "bloom":
        model.set_attn_implementation("eager")
        assert 0 < difference(question, fused, ask()) < SAME_SERVER[dtype]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.01
        for name in ("hidden_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.01)
    model.train()
    at_least = 1.2 if family == "bloom" else 0.0 if dtype is torch.bfloat16 else 1.2
    assert difference(question, ask(), ask()) > at_least * SAME_SERVER[dtype]


@pytest.mark.parametrize("size", [8, 32, 64, 256, 768, 4096, 14336])
@pytest.mark.parametrize(("batch", "seq"), [(1, 16), (4, 30), (64, 16), (1, 500)])
def test_a_question_misses_dropout_of_a_hundredth_with_less_than_one_in_a_million(size, batch, seq):
    question = question_from(torch.zeros(1, 1, 1).expand(batch, seq, size))
    rows, positions, _ = question.shape
    weights = rows * positions * (positions + 1) // 2 * max(1, size // 128)
    for elements in (weights, rows * positions * size):
        assert (1 - 2 * 0.01 * 0.99) ** elements <= 1e-6
    assert rows * positions <= 256
    if size >= 768:
        assert rows * positions == 16


def test_a_question_is_made_of_the_hidden_states_under_way():
    hidden = hidden_states(2, 20, SIZE)
    question = question_from(hidden)
    assert question.shape == (6, 16, SIZE)
    assert torch.equal(question[3], hidden[1, :16])
    assert question_from(hidden_states(1, 3, SIZE)).shape == (85, 3, SIZE)


def test_dropout_in_a_config():
    config = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.0,
        "attn_pdrop": 0.2,
        "embd_pdrop": 0.1,
        "classifier_dropout": 0.1,
        "ffn_dropout": None,
        "layerdrop": 0.3,
    }
    assert dropout_in(config) == {"hidden_dropout": 0.1, "attn_pdrop": 0.2}

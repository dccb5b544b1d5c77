"""The numbers of a row are its own: the same alone, among others, and after any calls before it.

For every family and every kind of rotary scaling, over a real swarm, held against Hugging Face's forward of one row.
"""

import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petals_eval.errors import ExampleError
from petals_eval.tasks.requests import Request
from tests.model.reference import PREFIX, close, full_logits, make_adapter
from tests.test_against_hugging_face import remote_model
from tests.tiny_models import FAMILIES, make_tiny

ORIGINAL, STRETCHED, LABELS = 24, 96, 3
HEAD_SIZE = 8
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [4.0, 3.0, 2.0, 1.5],
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {},
}
ROTARY_FAMILIES = tuple(family for family in FAMILIES if family != "bloom")


def test_every_kind_of_scaling_is_tried():
    assert set(SCALINGS) == {"default", *ROPE_INIT_FUNCTIONS}


def made(family, folder, kind):
    """A tiny classifier whose context is ORIGINAL before and STRETCHED after scaling."""
    if family == "bloom":
        return make_tiny(family, folder, blocks=3, labels=LABELS)
    before = kind in ("linear", "dynamic")
    own = {"head_dim": HEAD_SIZE} if family == "mixtral" else {}  # transformers 5.23 scales none that does not say it
    return make_tiny(
        family,
        folder,
        blocks=3,
        labels=LABELS,
        max_position_embeddings=ORIGINAL if before else STRETCHED,
        rope_parameters={"rope_type": kind, "rope_theta": 100.0, **SCALINGS[kind]},
        **own,
    )


def alone(folder, local, adapter, text):
    """Hugging Face's own logits of one row, by a model that was called for nothing else."""
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return full_logits(whole, local, adapter, text)


def drawn_texts(draws, longest):
    """Rows on both sides of the original length, some of them at it and next to it, in a shuffled order."""
    lengths = [draws.randint(1, longest) for _ in range(5)]
    lengths += [ORIGINAL - PREFIX - 1, ORIGINAL - PREFIX, ORIGINAL - PREFIX + 1, longest]
    texts = [tuple(draws.randint(3, 319) for _ in range(min(length, longest))) for length in lengths]
    draws.shuffle(texts)
    return texts


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bloom", "default"), *((family, kind) for family in ROTARY_FAMILIES for kind in SCALINGS)],
)
def test_a_row_alone_and_among_others(family, kind, tmp_path):
    draws = random.Random(f"{family} {kind}")
    folder = made(family, tmp_path, kind)
    with remote_model(folder, spans=[(0, 2), (2, 3)]) as model:
        adapter = make_adapter(model.local, "deep_ptune")
        longest = (model.local.context or STRETCHED) - PREFIX
        texts = drawn_texts(draws, longest)
        expected = [alone(folder, model.local, adapter, text) for text in texts]
        for size in (1, draws.randint(2, 3) * STRETCHED, 4096):  # alone, a few together, all together
            order = draws.sample(range(len(texts)), len(texts))
            requests = [Request(str(index), 0, texts[index]) for index in order]
            found = {
                int(each.request.key): each.answer
                for each in model.compute(requests, adapter, tokens_per_micro_batch=size)
            }
            assert all(close(found[index], expected[index]) for index in range(len(texts)))


def test_the_comparison_sees_a_row_that_depends_on_its_neighbours(tmp_path):
    """Hugging Face itself gives a short row other numbers beside a long one, where frequencies go by the longest."""
    folder = made("llama", tmp_path, "longrope")
    with remote_model(folder, spans=[(0, 3)]) as model:
        short, long = tuple(range(3, 13)), tuple(range(3, 83))
        whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            states = [whole.model(torch.tensor([ids])).last_hidden_state[0, 9] for ids in (short, short + (0,) * 70)]
        assert not torch.allclose(*states, atol=1e-3)
        found = {
            each.request.key: each.answer for each in model.compute([Request("s", 0, short), Request("l", 0, long)])
        }
        assert close(found["s"], alone(folder, model.local, None, short))
        assert close(found["l"], alone(folder, model.local, None, long))


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_a_row_that_servers_would_remember_fails_and_leaves_no_trace(family, tmp_path):
    folder = made(family, tmp_path, "dynamic")
    short, long = tuple(range(3, 3 + ORIGINAL)), tuple(range(3, 4 + ORIGINAL))
    with remote_model(folder, spans=[(0, 3)]) as model:
        before, after = [
            next(model.compute([Request("short", 0, short)])).answer for _ in range(2) if _refuses(model, long)
        ]
        assert torch.equal(before, after)
        assert close(after, alone(folder, model.local, None, short))


def _refuses(model, text):
    with pytest.raises(ExampleError, match="rope_type dynamic"):
        list(model.compute([Request("long", 0, text)]))
    return True

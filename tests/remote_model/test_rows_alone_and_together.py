"""The numbers of a row are its own: the same alone, among others, and after any calls before it.

For every family and every kind of rotary scaling, over a real swarm, held against Hugging Face's forward of one row.
"""

import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petals_eval import RemoteModel
from petals_eval.errors import ExampleError, RequestTooLargeError
from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.tasks.requests import Request
from tests.model.reference import PREFIX, full_logits, make_adapter
from tests.remote_model.test_against_hugging_face import remote_model
from tests.support.tensors import close
from tests.support.tiny_models import CLASSIFIED, make_tiny

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
ROTARY_FAMILIES = tuple(family for family in CLASSIFIED if family != "bloom")
SAMPLED_FAMILIES = ("llama", "mistral", "mixtral", "qwen3", "gemma3_text", "phi3", "falcon")
OWN_SCALINGS = {"phi3": ("default", "longrope")}  # its config takes no others
OWN_FIELDS = {
    "mixtral": {"head_dim": HEAD_SIZE},  # transformers 5.23 scales none that does not say it
    "phi3": {"original_max_position_embeddings": ORIGINAL},  # a field of its own, which goes before that of the scaling
    "deepseek_v3": {"qk_rope_head_dim": HEAD_SIZE},
}


def test_every_kind_of_scaling_is_tried():
    assert set(SCALINGS) == {"default", *ROPE_INIT_FUNCTIONS}


def made(family, folder, kind):
    """A tiny classifier whose context is ORIGINAL before and STRETCHED after scaling."""
    if family == "bloom":
        return make_tiny(family, folder, blocks=3, labels=LABELS)
    before = kind in ("linear", "dynamic")
    rope: dict = {"rope_type": kind, "rope_theta": 100.0, **SCALINGS[kind]}
    if family == "gemma3_text":  # one set of parameters for each kind of layer
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
    return make_tiny(
        family,
        folder,
        blocks=3,
        labels=LABELS,
        max_position_embeddings=ORIGINAL if before else STRETCHED,
        rope_parameters=rope,
        **OWN_FIELDS.get(family, {}),
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


def sampled():
    """Some families with the scalings that go by the length of calls and one that is drawn; the others are soaked."""
    others = [kind for kind in SCALINGS if kind not in ("longrope", "dynamic")]
    for family in ROTARY_FAMILIES:
        drawn = random.Random(family).choice(others)
        for kind in OWN_SCALINGS.get(family, SCALINGS):
            is_sample = family in SAMPLED_FAMILIES and kind in ("longrope", "dynamic", drawn)
            yield pytest.param(family, kind, marks=[] if is_sample else pytest.mark.soak)


@pytest.mark.parametrize(("family", "kind"), [("bloom", "default"), *sampled()])
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


SHORT, LONGER, LONG = (tuple(range(3, 3 + length)) for length in (ORIGINAL, ORIGINAL + 9, STRETCHED - 10))
FEW_TOKENS = ORIGINAL + 16


def test_longrope_rows_never_go_in_steps(tmp_path):
    """Steps turn the first positions by other angles than one call: a row too long for a call fails, and says so."""
    folder = made("llama", tmp_path, "longrope")
    options = {"max_batch_size": FEW_TOKENS, "inference_max_length": STRETCHED}
    with remote_model(folder, spans=[(0, 3)], **options) as model:
        requests = [Request("short", 0, SHORT), Request("longer", 0, LONGER), Request("long", 0, LONG)]
        failed = []
        found = {
            each.request.key: each.answer
            for each in model.compute(requests, on_failed=lambda request, error: failed.append((request.key, error)))
        }
        assert [key for key, _ in failed] == ["long"]
        assert "in steps it would get other numbers than in one call" in str(failed[0][1])
        for key, text in (("short", SHORT), ("longer", LONGER)):
            assert close(found[key], alone(folder, model.local, None, text))
        hidden = torch.randn(1, ORIGINAL, 32)
        too_long = model.blocks.inference_session(max_length=ORIGINAL + 1)
        with pytest.raises(RequestTooLargeError, match="in steps it would get other numbers"), too_long as session:
            session.step(hidden)
        with model.blocks.inference_session(max_length=ORIGINAL) as session:
            in_steps = torch.cat([session.step(hidden[:, :10]), session.step(hidden[:, 10:])], dim=1)
        assert close(in_steps, model.blocks(hidden))


def test_longrope_rows_go_to_a_server_that_takes_them_in_one_call_and_nobody_is_accused(tmp_path):
    """Also where answers are checked: a server that would have to compute them in steps cannot judge of them."""
    folder = made("llama", tmp_path, "longrope")
    options = {"max_batch_size": ORIGINAL - 4, "inference_max_length": STRETCHED}
    with (
        LocalSwarm(folder, spans=[(0, 3)] * 2, mode="thread", dht_prefix="tiny", **options) as swarm,
        LocalSwarm(folder, spans=[(0, 3)], mode="thread", dht_prefix="tiny", initial_peers=swarm.initial_peers),
    ):
        peers = swarm.initial_peers
        with RemoteModel.from_pretrained(str(folder), initial_peers=peers, dht_prefix="tiny", verify=1.0) as model:
            requests = [Request(str(index), 0, LONG[index:]) for index in range(8)]
            for each in model.compute(requests, tokens_per_micro_batch=1):
                assert close(each.answer, alone(folder, model.local, None, each.request.input_ids))
            model.blocks.settle()
            assert model.blocks.status().findings == ()
            assert model.blocks.audit_progress().impossible > 0


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", [family for family in ROTARY_FAMILIES if family not in OWN_SCALINGS])
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

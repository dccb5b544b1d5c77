"""Kinds of rotary scaling, read from configs as transformers writes them, of today and of 2023."""

from types import SimpleNamespace

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petals_eval.errors import ModelError, RequestTooLargeError
from petals_eval.model import LocalModel
from petals_eval.model.rotary import RotaryScaling, rotary_scaling
from tests.support.tiny_models import make_tiny

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("fields", "found"),
    (
        ({}, RotaryScaling("default", None)),
        ({"rope_scaling": None, "max_position_embeddings": 64}, RotaryScaling("default", None)),
        ({"rope_parameters": {"rope_theta": 1e4}, "max_position_embeddings": 64}, RotaryScaling("default", None)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RotaryScaling("linear", None)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64},
            RotaryScaling("dynamic", 64),
        ),
        # What some configs name beside it is not what transformers goes by.
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32},
                "max_position_embeddings": 64,
            },
            RotaryScaling("dynamic", 64),
        ),
        (
            {
                "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32},
                "max_position_embeddings": 128,
            },
            RotaryScaling("longrope", 32),
        ),
        (
            {
                "rope_scaling": LONGROPE,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 128,
            },
            RotaryScaling("longrope", 16),
        ),
        # A set of parameters for each kind of layer, as in Gemma 3.
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": LONGROPE | {"original_max_position_embeddings": 32},
                },
                "max_position_embeddings": 128,
            },
            RotaryScaling("longrope", 32),
        ),
        # No rotary embeddings at all.
        (
            {"alibi": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
            RotaryScaling("default", None),
        ),
    ),
)
def test_what_a_config_says(fields, found):
    assert rotary_scaling(SimpleNamespace(**fields)) == found


def test_every_kind_that_transformers_has_is_known():
    """A release with another kind fails here first: look whether a row's numbers depend on others with it."""
    for kind in {"default", *ROPE_INIT_FUNCTIONS}:
        config = SimpleNamespace(rope_parameters={"rope_type": kind}, max_position_embeddings=64)
        assert rotary_scaling(config).kind == kind


def test_an_unknown_kind_is_refused_by_name():
    config = SimpleNamespace(rope_scaling={"type": "su", "factor": 2.0}, max_position_embeddings=64)
    with pytest.raises(ModelError, match="rope_type 'su'; expected one of default, dynamic, linear"):
        rotary_scaling(config)


def test_a_row_that_a_server_would_remember_is_refused_with_that_reason(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = make_tiny("llama", tmp_path, max_position_embeddings=32, rope_parameters=scaling)
    local = LocalModel.from_pretrained(str(folder))
    local.check_length(tokens=28, prefix=4)
    with pytest.raises(
        RequestTooLargeError, match=r"33 positions.*\(rope_type dynamic\): beyond.*28 tokens of text at most"
    ):
        local.check_length(tokens=29, prefix=4)

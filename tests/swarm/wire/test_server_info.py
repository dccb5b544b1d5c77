"""What a server says of itself: read, or refused; and what follows from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.wire.server_info import ServerInfo, may_roll_back, other_layout, read_info
from tests.support.rpc_info import DESCRIPTOR, info


def test_info_is_read():
    read = read_info(info())
    assert read == ServerInfo("2.2.0", torch.bfloat16, torch.bfloat16, 10, 64, 3)


@pytest.mark.parametrize(
    "changes",
    [{"forward_schema": None}, {"outputs_schema": 5}, {"forward_schema": ((), {})}, {"outputs_schema": ("x",)}],
)
def test_info_that_is_none_is_refused(changes):
    with pytest.raises(PeerAnswerError, match="rpc_info"):
        read_info(info(**changes))


@pytest.mark.parametrize("tensors", [0, 1, 3, 10])
def test_the_layout_of_sessions_is_read(tensors):
    read = read_info(info(inference_schema=((DESCRIPTOR,) * tensors, {})))
    assert read.session_tensors == tensors
    said = other_layout(read)
    assert said is None if tensors == 3 else f"({tensors} tensors in a step, expected 3)" in said


@pytest.mark.parametrize(
    "schema",
    [
        None,
        3,
        "xyz",
        b"xyz",
        (),
        ((),),
        [[]],
        (3, {}),
        ("xyz", {}),
        ((1, 2, 3), {}),
        ((DESCRIPTOR, None, DESCRIPTOR), {}),
    ],
)
def test_a_layout_that_cannot_be_read_is_none_of_ours(schema):
    read = read_info(info(inference_schema=schema))
    assert read.session_tensors in (None, 0)
    assert "another layout" in other_layout(read)


@pytest.mark.parametrize("tokens", [-1, None, "many", 1.5])
def test_room_in_a_cache_that_is_no_number_is_not_known(tokens):
    assert read_info(info(cache_tokens_available=tokens)).cache_tokens_available is None


@given(st.binary(max_size=200))
def test_random_bytes_as_info_are_refused_and_nothing_else(serialized):
    with pytest.raises(PeerAnswerError):
        read_info(serialized)


def test_old_versions_are_not_even_asked():
    assert not may_roll_back("2.2.0.post1")
    assert not may_roll_back("1.1.5")
    assert all(may_roll_back(version) for version in ("2.3.0.dev2", "2.3.0", "2.10", "3.0", "unheard of", None))

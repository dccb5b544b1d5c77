"""How much a server takes at once, as its refusals say."""

import pytest

from petals_eval.errors import PeerRefusedError
from petals_eval.swarm.peers.limits import USUAL_MAX_TOKENS, ModelLimits, TokenLimits, says_cache_is_full


def limits(per_call: int | None = None, steps_alike: int | None = None) -> TokenLimits:
    return TokenLimits("...aaaaaa", per_call, ModelLimits(steps_alike))


def per_call(told: int) -> PeerRefusedError:
    return PeerRefusedError(f"ValueError('Task size greater than max_batch_size ({told}), it can\\'t be processed')")


@pytest.mark.parametrize(("told", "sent", "known"), [(6, 7, 6), (6, 6, None), (6, 5, None), (0, 7, None)])
def test_a_number_below_what_was_sent_is_the_limit(told, sent, known):
    """Any other would lead to the same call again, at once and for ever."""
    found = limits()
    assert found.learn_per_call(per_call(told), sent) is (known is not None)
    assert found.per_call == known


def test_a_limit_that_was_set_gives_way_to_what_the_server_says():
    found = limits(per_call=100)
    assert not found.learn_per_call(PeerRefusedError("out of memory"), 100) and found.per_call == 100
    assert found.learn_per_call(per_call(64), 100) and found.per_call == 64


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ("Failed to call handler: Cannot allocate KV cache for 7 tokens, max = 5", 5),
        ("Could not allocate 7000 bytes, max cache size = 4200 bytes, 0 in use", 4),
        ("Cannot allocate KV cache for 7 tokens, max = 7", None),
        ("Could not allocate 7000 bytes, max cache size = 9000 bytes, 3000 in use", None),
        ("Could not allocate 7000 bytes immediately: out of memory", None),
        ("out of memory", None),
    ],
)
def test_what_a_session_may_hold_is_read_from_either_refusal(words, limit):
    found = limits()
    assert found.learn_per_session(PeerRefusedError(words), 1, 7) is (limit is not None)
    refusal = found.session_refusal(1, 7)
    if limit is None:
        assert refusal is None
    else:
        assert f"holds 7 tokens (prompt included), but server ...aaaaaa takes {USUAL_MAX_TOKENS} in one" in str(refusal)
        assert f"has a cache for {limit} in a session of several" in str(refusal)
        assert found.session_refusal(1, limit) is None


def test_limits_of_sessions_are_known_by_their_rows():
    found = limits()
    found.learn_per_session(PeerRefusedError("Cannot allocate KV cache for 7 tokens, max = 5"), 3, 7)
    assert " in 3 rows, but server" in str(found.session_refusal(3, 6))
    assert found.session_refusal(2, 6) is found.session_refusal(3, 5) is None


def test_no_row_goes_in_steps_where_steps_compute_something_else():
    found = limits(per_call=4, steps_alike=8)
    assert found.session_refusal(1, 8) is None
    text = str(found.session_refusal(1, 9))
    assert "holds 9 tokens" in text and "more than the 8 up to which" in text and "takes 4 in one call" in text


@pytest.mark.parametrize(
    ("words", "is_full"),
    [
        ("Could not allocate 7000 bytes immediately: out of memory", True),
        ("Could not allocate 7000 bytes (timeout=0)", True),
        ("Could not allocate 7000 within 3 seconds", True),
        ("AllocationFailed('attention cache is full')", True),
        ("Could not allocate 7000 bytes, max cache size = 4200 bytes", False),
        ("CUDA out of memory", False),
    ],
)
def test_a_cache_that_is_full_now_is_told_from_one_that_is_too_small(words, is_full):
    assert says_cache_is_full(PeerRefusedError(words)) is is_full

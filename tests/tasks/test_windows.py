"""Windows: every token once, in windows that a model can read, after the context that the harness gives it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_eval.tasks.requests import Request
from petals_eval.tasks.windows import Windows

START = 99


def windows_of(count: int, longest: int, context: int = 1) -> Windows:
    return Windows("k", range(count), start=START, longest=longest, context=context)


def spelled(windows: Windows) -> list[tuple[list[int], dict[int, int]]]:
    return [(list(window.input_ids), dict(window.targets)) for window in windows]


# Written out by hand from lm-evaluation-harness 0.4.13, lm_eval/utils.py: what goes through the model is the context
# and the predicted tokens without the last one.
@pytest.mark.parametrize(
    ("count", "longest", "context", "expected"),
    [
        (1, 4, 1, [([START], {0: 0})]),
        (3, 4, 1, [([START, 0, 1], {0: 0, 1: 1, 2: 2})]),
        (4, 4, 1, [([START, 0, 1, 2], {0: 0, 1: 1, 2: 2, 3: 3})]),
        # The last window is filled with what comes before its only target.
        (5, 4, 1, [([START, 0, 1, 2], {0: 0, 1: 1, 2: 2, 3: 3}), ([0, 1, 2, 3], {3: 4})]),
        (
            10,
            4,
            1,
            [
                ([START, 0, 1, 2], {0: 0, 1: 1, 2: 2, 3: 3}),
                ([3, 4, 5, 6], {0: 4, 1: 5, 2: 6, 3: 7}),
                ([5, 6, 7, 8], {2: 8, 3: 9}),
            ],
        ),
        (
            8,
            4,
            3,
            [
                ([START, 0, 1, 2], {0: 0, 1: 1, 2: 2, 3: 3}),
                ([1, 2, 3, 4], {2: 4, 3: 5}),
                ([3, 4, 5, 6], {2: 6, 3: 7}),
            ],
        ),
        (3, 1, 1, [([START], {0: 0}), ([0], {0: 1}), ([1], {0: 2})]),
    ],
)
def test_small_documents_by_hand(count, longest, context, expected):
    assert spelled(windows_of(count, longest, context)) == expected


@given(st.data(), st.integers(1, 60), st.integers(1, 20))
def test_every_token_is_scored_once_after_as_much_context_as_asked_for(data, count, longest):
    context = data.draw(st.integers(1, longest))
    windows = windows_of(count, longest, context)
    whole = [START, *range(count)]
    scored = []
    assert len(list(windows)) == len(windows)
    for part, window in enumerate(windows):
        assert (window.key, window.part) == ("k", part)
        assert len(window.input_ids) <= longest
        begin = whole.index(window.input_ids[0])
        assert whole[begin : begin + len(window.input_ids)] == list(window.input_ids)
        positions = [position for position, _ in window.targets]
        assert positions == list(range(positions[0], len(window.input_ids)))
        assert all(whole[begin + position + 1] == token for position, token in window.targets)
        assert part == 0 or (len(window.input_ids) == longest and positions[0] >= context - 1)
        assert part in (0, len(windows) - 1) or positions[0] == context - 1
        scored += [token for _, token in window.targets]
    assert scored == list(range(count))
    assert windows.n_tokens == sum(len(window.input_ids) for window in windows)


def test_a_window_is_made_when_it_is_asked_for():
    windows = windows_of(1_000_000, 512)
    assert len(windows) == 1954
    assert isinstance(windows[-1], Request) and windows[-1].part == 1953
    assert [window.part for window in windows[1:3]] == [1, 2]
    assert windows[5] == windows[5] and windows[5] is not windows[5]
    with pytest.raises(IndexError):
        windows[1954]

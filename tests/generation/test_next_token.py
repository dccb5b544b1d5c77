"""The next token: greedy as argmax, drawn as the definition says, and by the seed, key and part alone."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from petals_eval.errors import NotFiniteError
from petals_eval.generation.next_token import TokenChoice
from petals_eval.tasks.requests import Decoding

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 1.0])


def drawn(decoding: Decoding, count: int, key: str = "0", part: int = 0) -> list[int]:
    choice = TokenChoice(decoding, key, part)
    return [choice.next(LOGITS) for _ in range(count)]


def expected_shares(*, temperature=1.0, top_k=0, top_p=1.0) -> dict[int, float]:
    """By the definitions, in numpy: temperature, then the highest k, then the fewest that reach p."""
    scores = LOGITS.numpy().astype(np.float64) / temperature
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    order = order[: top_k or None]
    powers = {token: math.exp(scores[token]) for token in order}
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += powers[token] / sum(powers.values())
        if reached >= top_p:
            break
    total = sum(powers[token] for token in kept)
    return {token: powers[token] / total for token in kept}


def test_greedy_takes_the_first_of_the_likeliest():
    assert drawn(Decoding(1), 3) == [1, 1, 1]


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 4, "top_p": 0.9}],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(how):
    count = 4000
    found = Counter(drawn(Decoding(1, **{"temperature": 1.0, "seed": 3, **how}), count))
    expected = expected_shares(**how)
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        assert abs(found[token] / count - share) < 5 * math.sqrt(share * (1 - share) / count) + 1e-9, token


def test_a_very_small_top_p_leaves_the_likeliest():
    assert set(drawn(Decoding(1, temperature=1.0, top_p=1e-9), 50)) == {1}


def test_the_draws_follow_from_seed_key_and_part_alone():
    sampled = Decoding(1, temperature=1.0, seed=5)
    torch.manual_seed(1)
    first = drawn(sampled, 30)
    torch.manual_seed(2)
    assert drawn(sampled, 30) == first
    others = [
        drawn(Decoding(1, temperature=1.0, seed=6), 30),
        drawn(sampled, 30, key="1"),
        drawn(sampled, 30, part=1),
    ]
    assert all(other != first for other in others)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_an_error_of_the_row(bad, temperature):
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFiniteError, match="expected finite scores"):
        TokenChoice(Decoding(1, temperature=temperature), "0", 0).next(logits)


def test_a_token_that_can_never_come_may_have_minus_infinity():
    logits = LOGITS.clone()
    logits[0] = -math.inf
    assert TokenChoice(Decoding(1, temperature=1.0, top_p=0.99), "0", 0).next(logits) in {1, 2, 3, 4}

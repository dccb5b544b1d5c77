"""Remote evaluation mode: does a server answer one question twice in the same way? Functions of tensors, no I/O.

Nothing on a Petals server calls `.eval()`. A model whose config has dropout above zero runs its blocks in training mode
there, whatever the client's own `model.eval()` says, and nothing in the answer shows it. So servers are asked: the same
hidden states, in two calls. Two equal rows in one call would be cheaper by a round trip, but a server that seeds its
generator for each call would only be found out across calls, and it is the answers across calls that a run mixes.
"""

import math
from collections.abc import Mapping

import torch

__all__ = ["difference", "dropout_in", "question_from"]

_POSITIONS = 16
"""Positions of a question. Dropout on attention weights shows best at the first ones, where few are averaged."""
_HEAD_SIZE = 128
"""The size assumed of attention heads, to count their weights; where heads are smaller there are more."""
_MIN_ELEMENTS = math.ceil(math.log(1e-6) / math.log(1 - 2 * 0.01 * 0.99))
"""Elements that dropout must be able to hit: two masks of so many elements (691) are equal with probability 1e-6 at
p = 0.01, as each element differs between them with probability 2 p (1 - p)."""
_MAX_TOKENS = 256
"""Tokens of a question at most, however short the rows at hand are."""


def question_from(hidden: torch.Tensor) -> torch.Tensor:
    """Make a question that is small and sharp: (rows, positions, hidden size), from the hidden states under way.

    Real ones, so that their scale is that of the blocks asked, wherever in the model they stand: the first positions
    (the causal mask makes them a text of their own) of the first rows, repeated where there are too few. As many as it
    takes for dropout of 0.01 on either the hidden states or the attention weights of a single block to draw two equal
    masks with a probability below 1e-6: 96 tokens for a hidden size of 64, 16 from 768 on.
    """
    at_hand, length, size = hidden.shape
    positions = min(length, _POSITIONS)
    weights = positions * (positions + 1) // 2 * max(1, size // _HEAD_SIZE)
    rows = math.ceil(_MIN_ELEMENTS / min(weights, positions * size))
    rows = max(1, min(rows, _MAX_TOKENS // positions))
    return hidden[torch.arange(rows) % at_hand, :positions]


def difference(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> float:
    """Return how much of what the blocks did to the question they did not do again: 0 for equal bits, about 1.4 for
    unrelated answers.

    question, first, second: (rows, positions, hidden size).

    The root mean square of `first - second` over that of `mean(first, second) - question`. Against the answer itself
    it would say little: deep in a model a block adds a hundredth to the hidden states it is given. Elements eight times
    as large as the median of their position are left out: trained models keep a few channels a thousand times as large
    as the rest, and a last bit of theirs outweighs what the others do.
    """
    if torch.equal(first, second):
        return 0.0
    question = question.to(first.device, first.dtype).float()
    first, second = first.float(), second.float()
    mean = (first + second) / 2
    size = mean.abs()
    usual = size <= 8 * size.median(dim=-1, keepdim=True).values
    apart = _norm((first - second)[usual])
    done = _norm((mean - question)[usual])
    return apart / done if done > 0 else math.inf


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def dropout_in(config: Mapping[str, object]) -> dict[str, float]:
    """Return what a model's config (`config.to_dict()`) says of dropout in the blocks, where it is above zero.

    Fields of the embeddings and the classifier are left aside: these stay at home, where they are in evaluation mode.

    >>> dropout_in({"hidden_dropout": 0.1, "attn_pdrop": 0, "classifier_dropout": 0.5, "hidden_size": 64})
    {'hidden_dropout': 0.1}
    """
    return {
        name: float(value)
        for name, value in config.items()
        if ("dropout" in name or name.endswith("pdrop"))
        and not name.startswith(("embd", "embed", "classifier", "summary"))
        and isinstance(value, (int, float))
        and value > 0
    }

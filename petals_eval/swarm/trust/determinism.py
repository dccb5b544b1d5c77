"""Remote evaluation mode: does a server answer one question twice in the same way? Pure functions, no I/O.

Nothing on a Petals server calls `.eval()`. A model whose config has dropout above zero runs its blocks in training mode
there, whatever the client's own `model.eval()` says, and nothing in the answer shows it. So servers are asked: the same
hidden states, in two calls. Two equal rows in one call would be cheaper by a round trip, but a server that seeds its
generator for each call would only be found out across calls, and it is the answers across calls that a run mixes.
"""

import math
from collections.abc import Mapping

import torch

__all__ = ["TOLERANCE", "difference", "dropout_in", "question_from"]

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}
"""The `difference` that rounding alone can make, by the dtype of the answers.

One server gives one question the same bits twice: Petals computes each call by itself, and on a processor not even
another batch around it changed a bit (Llama and BLOOM blocks, all three dtypes). What is allowed for is a server that
adds up in another order from call to call, as a GPU may that picks another kernel or merges calls. Measured on 1 to 8
Llama blocks by computing once with Hugging Face's eager attention and once with PyTorch's fused one, with hidden states
1 to 100 times as large as the blocks' own contribution:

                                         float32         float16         bfloat16
    another order                        5e-7            0.001 - 0.007   0.007 - 0.042
    dropout 0.01 of what a block adds    0.14            0.14            0.14           = sqrt(2 p / (1 - p))
    dropout 0.1 of what a block adds     0.47            0.47            0.47
    dropout 0.01 of attention weights    0.03 - 0.12     0.03 - 0.12     0.05 - 0.23    and nothing else
    dropout 0.1 of attention weights     0.1 - 0.4       0.1 - 0.4       0.1 - 0.4

What dropout on attention weights alone does at 0.01 can thus hide below bfloat16's own rounding, and is then no worse
than it.
"""

_POSITIONS = 16
"""Of a question. Dropout on attention weights shows best at the first positions, where few weights are averaged."""
_HEAD_SIZE = 128
"""Assumed of attention heads, to count their weights; where heads are smaller there are more."""
_CHANCES = math.ceil(math.log(1e-6) / math.log(1 - 2 * 0.01 * 0.99))
"""Elements that dropout must be able to hit: two masks of so many elements (691) are equal with probability 1e-6 at
p = 0.01, as each element differs between them with probability 2 p (1 - p)."""
_MOST_TOKENS = 256
"""Of a question, however short the rows at hand are."""


def question_from(hidden: torch.Tensor) -> torch.Tensor:
    """A question small and sharp: (rows, positions, hidden) from the hidden states (batch, seq, hidden) under way.

    Real ones, so that their scale is that of the blocks asked, wherever in the model they stand: the first positions
    (the causal mask makes them a text of their own) of the first rows, repeated where there are too few. As many as it
    takes for dropout of 0.01 on either the hidden states or the attention weights of a single block to draw two equal
    masks with a probability below 1e-6: 96 tokens for a hidden size of 64, 16 from 768 on.
    """
    batch, seq, size = hidden.shape
    positions = min(seq, _POSITIONS)
    weights = positions * (positions + 1) // 2 * max(1, size // _HEAD_SIZE)
    rows = math.ceil(_CHANCES / min(weights, positions * size))
    rows = max(1, min(rows, _MOST_TOKENS // positions))
    return hidden[torch.arange(rows) % batch, :positions]


def difference(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> float:
    """How much of what the blocks did to the question they did not do again: 0 for equal bits, about 1.4 for unrelated.

    question, first, second: (rows, positions, hidden).

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
    """What a model's config (`config.to_dict()`) says of dropout in the blocks, where it is above zero.

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

"""How far two answers may differ by rounding alone: two of one server, and those of two servers. No I/O.

There are two tolerances, each with a measure of its own. `SAME_SERVER` goes with `determinism.difference`, for a server
that is asked one question twice. `excess` is for two servers, or one and blocks at home.

What two honest servers may differ by was measured with the blocks of stories260K (5, trained) and of tiny BLOOM, Llama,
Qwen3 and Falcon models (8, hidden size 64, random weights), on 16 x 64 positions: all blocks, the first, the last, the
later half, and with hidden states 30 and 100 times as large as usual. TF32 was imitated by rounding weights and
inputs to its 10 bits, int8 and nf4 by rounding weights as bitsandbytes does. `scripts/measure_tolerance.py` makes the
table: `excess` with every unit at 1 and every limit at 1, the largest of all cases.

                                     whole   a token   a value  |  L2: whole   a token
    float32: another attention kernel    2e-6    6e-6      2e-5     |  2e-6        5e-6
    float32: TF32 and not (trained)      0.0009  0.0026    0.009    |  0.0006      0.0019
    float32: TF32 and not                0.0047  0.015     0.051    |  0.0038      0.014
    float32 - float16                    0.011   0.032     0.13     |  0.0072      0.029
    float16: another attention kernel    0.0063  0.020     0.081    |  0.0051      0.016
    float32 - bfloat16 (trained)         0.026   0.066     0.31     |  0.011       0.044
    float32 - bfloat16                   0.073   0.30      0.77     |  0.057       0.25
    bfloat16: another attention kernel   0.051   0.16      0.56     |  0.041       0.13
    float32 - int8 weights               0.10    0.34      1.2      |  0.081       0.31
    float32 - nf4 weights (trained)      0.29    0.75      2.7      |  0.18        0.58
    float32 - nf4 weights                1.1     2.6       7.6      |  0.78        1.5

    noise of 1% of the answer            0.0085 at least
A row alone or among others gave the same bits in every dtype.

"Trained" is stories260K alone. The largest numbers come from a Llama model of random weights whose blocks amplify
any difference tenfold; no trained model of this depth does. Against its own dtype a float32 server that adds noise of
1% is told from one that uses TF32 by a factor of nine, and from one with other kernels by thousands. The limits are in
`UNIT` times `WHOLE`, `TOKEN` and `VALUE`: 0.005 for float32 against itself, 0.09 against bfloat16.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

__all__ = [
    "SAME_SERVER",
    "Kind",
    "Parts",
    "allowed",
    "excess",
    "measure",
    "relative_difference",
]

SAME_SERVER: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}
"""One server asked twice: the `determinism.difference` that rounding alone can make, by the dtype of the answers.

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

UNIT: Mapping[torch.dtype, float] = {torch.float32: 1.8e-3, torch.float16: 6e-3, torch.bfloat16: 4.5e-2}
"""What rounding in a dtype does, relative to what the blocks do: TF32's for float32, which a GPU may use for it."""
LAST_BIT: Mapping[torch.dtype, float] = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""What rounding of the hidden states themselves does, relative to these: they may be far larger than what is added."""
QUANTISED: Mapping[str, float] = {"none": 0.0, "int8": 8e-2, "nf4": 0.55}
"""The same for quantised weights against others. A quantisation that is not known counts as the coarsest."""
QUANTISED_ALIKE: Mapping[str, float] = {"none": 0.0, "int8": 4e-2, "nf4": 8e-2}
"""For weights quantised in the same way: only what the rounding of activations may tip over remains."""

WHOLE, TOKEN, VALUE = 2.0, 10.0, 30.0
"""Units by which the whole answer, a token, a value may differ: root mean squares; the rarer, the further out."""


class Kind(NamedTuple):
    """What a server computes with: the dtype of its answers, and its own word on quantisation."""

    dtype: torch.dtype
    quant: str

    @classmethod
    def of(cls, dtype: torch.dtype, quant: str | None) -> "Kind":
        """Servers that say nothing of quantisation do none."""
        return cls(dtype, quant or "none")


class Parts(NamedTuple):
    """The root mean square over all values, the largest over those of one token, and the largest of a single value."""

    whole: float
    token: float
    value: float


def excess(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor, kinds: tuple[Kind, Kind]) -> float:
    """Return by how much the answers of two servers differ, against what rounding explains: up to 1 it does.

    question, first, second: (batch, seq, hidden), before the blocks and after them. kinds: of the two who answered.

    Three things are held against their limits, and the furthest counts: the whole, which shows small noise everywhere;
    the worst token, which shows a single wrong row; the worst value, which shows a single flipped bit.
    """
    if first.dtype == second.dtype and torch.equal(first, second):
        return 0.0
    unit, last_bit = allowed(*kinds)
    parts = measure(question, first, second, unit, last_bit)
    return max(parts.whole / WHOLE, parts.token / TOKEN, parts.value / VALUE)


def measure(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor, unit: float, last_bit: float) -> Parts:
    """Return the difference in units of what is usual at each value.

    unit: relative to what the blocks did to a value or to its token, whichever is more (their quadratic mean).
        Against the answer itself a wrong block would hardly show: deep in a model it adds a hundredth to what it gets.
        A token's share is taken from its median, for trained models keep a few channels a thousand times as large.
    last_bit: relative to the value itself.
    """
    size = question.shape[-1]
    triples = [tensor.reshape(-1, size).split(max(1, _AT_ONCE // size)) for tensor in (question, first, second)]
    parts = list(zip(*triples, strict=True))
    # 1.4826: a normal distribution's deviation by its median
    of_tokens = [1.4826 * _done(*part)[1].median(dim=-1, keepdim=True).values for part in parts]
    least = 0.1 * torch.cat(of_tokens).median()  # a token the blocks left alone is rounded all the same
    total, token, value = 0.0, 0.0, 0.0
    for part, of_token in zip(parts, of_tokens, strict=True):
        mean, done = _done(*part)
        usual = unit * torch.sqrt((torch.maximum(of_token, least).square() + done.square()) / 2)
        usual = usual + last_bit * mean.abs() + torch.finfo(torch.float32).tiny
        squares = ((part[1].double() - part[2].double()) / usual).square()
        total += float(squares.sum())
        token = max(token, float(squares.mean(dim=-1).max()))
        value = max(value, float(squares.max()))
    return Parts(math.sqrt(total / question.numel()), math.sqrt(token), math.sqrt(value))


_AT_ONCE = 1 << 20
"""Values compared together: in float64, for a flipped bit can come close to the largest float32 there is."""


def _done(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of two answers, and how far it is from the question. float64 (tokens, hidden size)."""
    mean = (first.double() + second.double()) / 2
    return mean, (mean - question.double()).abs()


def relative_difference(question: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the difference for a person to read: the L2 norm of the difference over that of what the blocks did."""
    question, first, second = question.double(), first.double(), second.double()
    done = float(torch.linalg.vector_norm((first + second) / 2 - question))
    return float(torch.linalg.vector_norm(first - second)) / done if done else math.inf


def allowed(first: Kind, second: Kind) -> tuple[float, float]:
    """Return the unit and the last bit that fit two kinds: errors of two servers add up as independent ones do."""
    if first.quant == second.quant:
        quantised = QUANTISED_ALIKE.get(first.quant, max(QUANTISED.values()))
    else:
        coarsest = max(QUANTISED.values())
        quantised = math.hypot(QUANTISED.get(first.quant, coarsest), QUANTISED.get(second.quant, coarsest))
    unit = math.hypot(UNIT[first.dtype], UNIT[second.dtype], quantised)
    return unit, max(LAST_BIT[first.dtype], LAST_BIT[second.dtype])

"""The canary: random hidden states, and which blocks are asked to compute them.

No weights are needed at home. The hidden size is in the servers' own descriptors (rpc_info), and the scale is that of
embeddings. It hardly matters to what a block adds, for every family normalises what it reads; but the smaller the
canary is beside that, the less its own rounding hides.

To compare servers whose spans differ, the model is cut wherever a span begins or ends: all blocks between two cuts are
held by the same servers, which compute one and the same question there.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from petals_eval.swarm.trust.determinism import question_from

__all__ = ["Segment", "canary_for", "segments_of", "shared_segments"]

Segment = tuple[int, int]
"""Blocks first:last."""

_ROWS = 256
_SCALE = 0.1  # standard deviation
_MOST_SEGMENTS = 8
"""Calls to one server to compare it with others: each is a canary there and back."""


def canary_for(segment: Segment, hidden_size: int, positions: int) -> torch.Tensor:
    """Hidden states (rows, positions, hidden) in float32: the same for everybody who is asked about these blocks.

    As many rows as dropout of 0.01 in one block needs to show (`determinism.question_from`).
    """
    seed = hash((segment, hidden_size, positions)) % 2**63
    random = torch.Generator().manual_seed(seed)
    rows = question_from(torch.empty(_ROWS, positions, 1).expand(_ROWS, positions, hidden_size)).shape
    return _SCALE * torch.randn(rows[0], rows[1], hidden_size, generator=random, dtype=torch.float32)


def segments_of(spans: Iterable[Segment]) -> tuple[Segment, ...]:
    """The parts into which the borders of the spans cut what they hold.

    >>> segments_of([(0, 4), (2, 6)])
    ((0, 2), (2, 4), (4, 6))
    """
    held = list(spans)
    cuts = sorted({border for span in held for border in span})
    return tuple(
        (first, last) for first, last in pairwise(cuts) if any(start <= first and last <= end for start, end in held)
    )


def shared_segments(span: Segment, segments: Sequence[Segment], held_by: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of a span that somebody else holds, too: `_MOST_SEGMENTS` at most, everybody preferring the same.

    held_by: servers of each segment.
    """
    shared = [
        (index * 2654435761 % 2**32, segment)  # a fixed shuffle, so that the choice is spread over the model
        for index, (segment, holders) in enumerate(zip(segments, held_by, strict=True))
        if holders > 1 and span[0] <= segment[0] and segment[1] <= span[1]
    ]
    return tuple(sorted(segment for _, segment in sorted(shared)[:_MOST_SEGMENTS]))

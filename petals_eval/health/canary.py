"""The canary: random hidden states, and which blocks are asked to compute them.

No weights are needed at home. The hidden size is in the servers' own descriptors (rpc_info), and the scale is that of
embeddings. It hardly matters to what a block adds, for every family normalises what it reads; but the smaller the
canary is beside that, the less its own rounding hides.

To compare servers whose spans differ, the model is cut wherever a span begins or ends: all blocks of such a segment are
held by the same servers, which compute one and the same question there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from petals_eval.swarm.trust.determinism import question_from
from petals_eval.swarm.wire.span import Span

__all__ = ["CanaryPolicy", "canary_for", "segments_of", "shared_segments"]


@dataclass(frozen=True)
class CanaryPolicy:
    """How large canaries are, and how many a server is sent.

    max_rows: of a canary. scale: the standard deviation of its values.
    max_segments: that one server is asked for, to compare it with others; each is a canary there and back.
    """

    max_rows: int = 256
    scale: float = 0.1
    max_segments: int = 8


def canary_for(span: Span, hidden_size: int, positions: int) -> torch.Tensor:
    """Return hidden states (rows, positions, hidden size) in float32.

    They are the same for everybody who is asked about these blocks, and have as many rows as dropout of 0.01 in one
    block needs to show (`determinism.question_from`).
    """
    seed = hash((span, hidden_size, positions)) % 2**63
    random = torch.Generator().manual_seed(seed)
    largest = torch.empty(CanaryPolicy.max_rows, positions, 1).expand(CanaryPolicy.max_rows, positions, hidden_size)
    rows, positions, _ = question_from(largest).shape
    return CanaryPolicy.scale * torch.randn(rows, positions, hidden_size, generator=random, dtype=torch.float32)


def segments_of(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return the parts into which the borders of the spans cut what they hold.

    >>> [str(segment) for segment in segments_of([Span(0, 4), Span(2, 6)])]
    ['0:2', '2:4', '4:6']
    """
    held = set(spans)
    cuts = sorted({border for span in held for border in (span.start, span.stop)})
    return tuple(cut for cut in map(Span, cuts[:-1], cuts[1:]) if any(map(cut.within, held)))


def shared_segments(span: Span, segments: Sequence[Span], holders: Sequence[int]) -> tuple[Span, ...]:
    """Return the segments of a span that somebody else holds, too, as many as the policy allows.

    holders: how many servers hold each segment. Where there are too many all servers prefer the same ones.
    """
    shared = [
        (index * 2654435761 % 2**32, segment)  # a fixed shuffle, so that the choice is spread over the model
        for index, (segment, count) in enumerate(zip(segments, holders, strict=True))
        if count > 1 and segment.within(span)
    ]
    return tuple(sorted(segment for _, segment in sorted(shared)[: CanaryPolicy.max_segments]))

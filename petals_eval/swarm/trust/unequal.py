"""Servers that gave unequal answers, to one question or to what others answer: who they are, how a person is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from petals_eval.swarm.peers.peer import short_peer
from petals_eval.swarm.trust.arbiter import Finding
from petals_eval.swarm.wire.records import SpanServer

__all__ = ["UnequalServer", "Verdict", "dropout_text", "stop_text", "unequal_by", "warning_text"]

Verdict = Literal["noisy", "liar", "disputed"]
"""noisy: two answers to one question. liar: another answer than others, or blocks at home. disputed: another answer
than `others`, and nobody to settle which is right."""


@dataclass(frozen=True, slots=True)
class UnequalServer:
    """A server that gave two answers to one question, or another one than those who compute the same.

    difference: of two answers, relative to what the blocks did to the question.
    is_used: all the same, because nobody else holds its blocks and the settings allow it, or because it is disputed.
    others: peer ids it was held against; none where that was itself or blocks at home.
    blocks: first:last, those in question; None: all of its span.
    witness: against whom a liar was found out: "others", "home" or "itself".
    """

    server: SpanServer
    difference: float
    is_used: bool = False
    verdict: Verdict = "noisy"
    others: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None
    witness: str = "others"


def unequal_by(finding: Finding) -> UnequalServer:
    """What a check came to, as a run tells of it."""
    return UnequalServer(
        finding.server,
        finding.difference,
        is_used=finding.verdict == "disputed",
        verdict=finding.verdict,
        others=finding.others,
        blocks=(finding.first, finding.last),
        witness=finding.witness,
    )


def warning_text(unequal: UnequalServer, others: int, dropout: Mapping[str, float]) -> str:
    """others: servers that hold all of the blocks it was wanted for. dropout: what the model's config at home says."""
    if unequal.verdict == "disputed":
        return _dispute_text(unequal)
    others_text = f"; {others} other server{'s hold' if others != 1 else ' holds'} these blocks" if others else ""
    then = "Nobody else holds these blocks, so it is used all the same" if unequal.is_used else "It is left out"
    if unequal.verdict == "liar":
        then += " and what it computed is computed again"
    return f"warning: server {_accusation(unequal, dropout)}. {then}{others_text}."


def stop_text(blocks: str, caught: Sequence[UnequalServer], dropout: Mapping[str, float]) -> str:
    """Why a run cannot go on, and what would let it. blocks: those that nobody else holds."""
    noisy = [each for each in caught if each.verdict == "noisy"]
    standing = "in evaluation mode" if len(noisy) == len(caught) else "that is trusted"
    lines = [f"no server {standing} holds blocks {blocks}:"]
    lines += [f"  server {_accusation(each, dropout)}" for each in caught[:_MOST_NAMED]]
    if len(caught) > _MOST_NAMED:
        lines.append(f"  and {len(caught) - _MOST_NAMED} more")
    if noisy:
        lines.append(
            "Every run would give other numbers. Have dropout set to 0 in the config.json these servers load, or go on "
            "with --allow-nondeterministic (allow_nondeterministic=True in Python): the report then says how far "
            "answers differ."
        )
    if len(noisy) < len(caught):
        lines.append(
            "Their answers would be counted as if they were the model's. Run the same command again when another "
            "server holds these blocks."
        )
    return "\n".join(lines)


def _dispute_text(unequal: UnequalServer) -> str:
    first, last = unequal.blocks or (unequal.server.start, unequal.server.end)
    names = " and ".join(short_peer(peer_id) for peer_id in (unequal.server.peer_id, *unequal.others))
    return (
        f"warning: servers {names} do not agree on blocks {first}:{last} (difference {unequal.difference:.2g}), and "
        "nobody else can say who is right. Examples they computed are marked in the predictions. One more server of "
        f"these blocks would settle it, or these blocks at home: --verify-local {first}:{last}."
    )


def dropout_text(dropout: Mapping[str, float]) -> str:
    """
    >>> dropout_text({"hidden_dropout": 0.1, "attention_dropout": 0.05})
    'hidden_dropout 0.1, attention_dropout 0.05'
    """
    return ", ".join(f"{name} {value:g}" for name, value in dropout.items())


_MOST_NAMED = 3


_WITNESSES = {
    "others": "answered otherwise than others that hold the same blocks",
    "home": "answered otherwise than the same blocks at home",
    "itself": "answered otherwise than another server, and otherwise again when it was asked once more",
}


def _accusation(unequal: UnequalServer, dropout: Mapping[str, float]) -> str:
    server = unequal.server
    who = (
        f"{short_peer(server.peer_id)} (blocks {server.start}:{server.end}, petals "
        f"{server.record.version or 'of unknown version'})"
    )
    if unequal.verdict == "liar":
        return f"{who} {_WITNESSES[unequal.witness]} (difference {unequal.difference:.2g}): its answers are wrong"
    cause = f" (this model's config has {dropout_text(dropout)})" if dropout else ""
    return (
        f"{who} gave two answers to one question (difference {unequal.difference:.2g}): its blocks run in training "
        f"mode{cause}"
    )

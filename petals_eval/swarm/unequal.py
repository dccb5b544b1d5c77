"""Servers that gave two answers to one question: who they are, and how a person is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from petals_eval.swarm.peers import short_peer
from petals_eval.swarm.records import SpanServer

__all__ = ["UnequalServer", "dropout_text", "stop_text", "warning_text"]


@dataclass(frozen=True, slots=True)
class UnequalServer:
    """A server that gave two answers to one question.

    difference: of the two, relative to what the blocks did to the question (`determinism.difference`).
    is_used: all the same, because nobody else holds its blocks and the settings allow it.
    """

    server: SpanServer
    difference: float
    is_used: bool = False


def warning_text(unequal: UnequalServer, others: int, dropout: Mapping[str, float]) -> str:
    """others: servers that hold all of the blocks it was wanted for. dropout: what the model's config at home says."""
    others_text = f"; {others} other server{'s hold' if others != 1 else ' holds'} these blocks" if others else ""
    then = "Nobody else holds these blocks, so it is used all the same" if unequal.is_used else "It is left out"
    return f"warning: server {_accusation(unequal, dropout)}. {then}{others_text}."


def stop_text(blocks: str, caught: Sequence[UnequalServer], dropout: Mapping[str, float]) -> str:
    """Why a run cannot go on, and what would let it. blocks: those that nobody else holds."""
    lines = [f"no server in evaluation mode holds blocks {blocks}:"]
    lines += [f"  server {_accusation(each, dropout)}" for each in caught[:_MOST_NAMED]]
    if len(caught) > _MOST_NAMED:
        lines.append(f"  and {len(caught) - _MOST_NAMED} more")
    lines.append(
        "Every run would give other numbers. Have dropout set to 0 in the config.json these servers load, or go on "
        "with --allow-nondeterministic (allow_nondeterministic=True in Python): the report then says how far answers "
        "differ."
    )
    return "\n".join(lines)


def dropout_text(dropout: Mapping[str, float]) -> str:
    """
    >>> dropout_text({"hidden_dropout": 0.1, "attention_dropout": 0.05})
    'hidden_dropout 0.1, attention_dropout 0.05'
    """
    return ", ".join(f"{name} {value:g}" for name, value in dropout.items())


_MOST_NAMED = 3


def _accusation(unequal: UnequalServer, dropout: Mapping[str, float]) -> str:
    server = unequal.server
    cause = f" (this model's config has {dropout_text(dropout)})" if dropout else ""
    return (
        f"{short_peer(server.peer_id)} (blocks {server.start}:{server.end}, petals "
        f"{server.record.version or 'of unknown version'}) gave two answers to one question (difference "
        f"{unequal.difference:.2g}): its blocks run in training mode{cause}"
    )

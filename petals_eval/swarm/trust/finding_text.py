"""What a person is told of servers that cannot be counted on."""

from collections.abc import Mapping, Sequence

from petals_eval.swarm.peers.finding import TrustFinding, Witness
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import plural

__all__ = ["dropout_text", "stop_text", "warning_text"]

_MAX_NAMED = 3


def warning_text(finding: TrustFinding, others: int, dropout: Mapping[str, float]) -> str:
    """Return the warning that a run prints.

    others: servers that hold all of the blocks it was wanted for. dropout: what the model's config at home says.
    """
    if finding.status == "disputed":
        return _dispute_text(finding)
    others_text = f"; {plural(others, 'other server holds', 'other servers hold')} these blocks" if others else ""
    then = "Nobody else holds these blocks, so it is used all the same" if finding.is_used else "It is left out"
    if finding.status == "wrong":
        then += " and what it computed is computed again"
    return f"warning: server {_accusation(finding, dropout)}. {then}{others_text}."


def stop_text(blocks: str, caught: Sequence[TrustFinding], dropout: Mapping[str, float]) -> str:
    """Return why a run cannot go on, and what would let it. blocks: those that nobody else holds."""
    training = [each for each in caught if each.status == "nondeterministic"]
    standing = "in evaluation mode" if len(training) == len(caught) else "that is trusted"
    lines = [f"no server {standing} holds blocks {blocks}:"]
    lines += [f"  server {_accusation(each, dropout)}" for each in caught[:_MAX_NAMED]]
    if len(caught) > _MAX_NAMED:
        lines.append(f"  and {len(caught) - _MAX_NAMED} more")
    if training:
        lines.append(
            "Every run would give other numbers. Have dropout set to 0 in the config.json these servers load, or go on "
            "with --allow-nondeterministic (allow_nondeterministic=True in Python): the report then says how far "
            "answers differ."
        )
    if len(training) < len(caught):
        lines.append(
            "Their answers would be counted as if they were the model's. Run the same command again when another "
            "server holds these blocks."
        )
    return "\n".join(lines)


def _dispute_text(finding: TrustFinding) -> str:
    names = " and ".join(short_peer(peer_id) for peer_id in (finding.server.peer_id, *finding.others))
    return (
        f"warning: servers {names} do not agree on blocks {finding.blocks} (difference {finding.difference:.2g}), and "
        "nobody else can say who is right. Examples they computed are marked in the predictions. One more server of "
        f"these blocks would settle it, or these blocks at home: --verify-local {finding.blocks}."
    )


def dropout_text(dropout: Mapping[str, float]) -> str:
    """
    >>> dropout_text({"hidden_dropout": 0.1, "attention_dropout": 0.05})
    'hidden_dropout 0.1, attention_dropout 0.05'
    """
    return ", ".join(f"{name} {value:g}" for name, value in dropout.items())


_WITNESSES: Mapping[Witness, str] = {
    "others": "answered otherwise than others that hold the same blocks",
    "home": "answered otherwise than the same blocks at home",
    "itself": "answered otherwise than another server, and otherwise again when it was asked once more",
    "call": "answered otherwise after it went back in a session than in one call of all positions",
}


def _accusation(finding: TrustFinding, dropout: Mapping[str, float]) -> str:
    server = finding.server
    version = server.record.version or "of unknown version"
    who = f"{short_peer(server.peer_id)} (blocks {server.span}, petals {version})"
    if finding.status == "wrong":
        return f"{who} {_WITNESSES[finding.witness]} (difference {finding.difference:.2g}): its answers are wrong"
    cause = f" (this model's config has {dropout_text(dropout)})" if dropout else ""
    return (
        f"{who} gave two answers to one question (difference {finding.difference:.2g}): its blocks run in training "
        f"mode{cause}"
    )

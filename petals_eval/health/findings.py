"""The name of everything a look at a swarm can find, what it means, and how bad it is."""

from dataclasses import dataclass

from petals_eval.errors import (
    PeerAnswerError,
    PeerError,
    PeerNotFiniteError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
)
from petals_eval.health.results import Finding, Verdict
from petals_eval.health.settings import Level
from petals_eval.swarm.peers.peer import in_words
from petals_eval.text import printable

__all__ = ["FINDINGS", "Kind", "finding", "from_forward_error", "from_info_error"]


@dataclass(frozen=True, slots=True)
class Kind:
    """implies: the best verdict of a server, or of a model, that has such a finding."""

    meaning: str
    implies: Verdict
    level: Level


_BROKEN, _UNKNOWN, _DEGRADED = Verdict.BROKEN, Verdict.UNKNOWN, Verdict.DEGRADED

FINDINGS: dict[str, Kind] = {
    # of a model
    "not-announced": Kind("nobody announces this model", _BROKEN, Level.RECORD),
    "missing-blocks": Kind("no usable server holds some of the blocks", _BROKEN, Level.RECORD),
    "thin-blocks": Kind("some blocks have fewer servers than --min-replicas", _DEGRADED, Level.RECORD),
    "malformed-records": Kind("records under the model's keys that cannot be read", _DEGRADED, Level.RECORD),
    "route-fails": Kind("a canary did not get through all blocks", _BROKEN, Level.ROUTE),
    # of a server's record
    "joining": Kind("it announces that it is still loading its blocks", _DEGRADED, Level.RECORD),
    "stale-record": Kind("its record was not renewed in time, or old ones live on", _DEGRADED, Level.RECORD),
    "wrong-span": Kind("it does not hold all the blocks that its record names", _BROKEN, Level.RECORD),
    "adapter-not-announced": Kind("it does not announce the LoRA adapter asked for", _DEGRADED, Level.RECORD),
    # of what it says itself
    "record-without-server": Kind("nobody in the swarm knows an address of it", _BROKEN, Level.INFO),
    "unreachable": Kind("it has addresses, and no connection to them could be made", _BROKEN, Level.INFO),
    "no-answer": Kind("it is connected and did not answer in time", _BROKEN, Level.INFO),
    "not-a-server": Kind("a peer is there that does not speak the protocol of a Petals server", _BROKEN, Level.INFO),
    "info-refused": Kind("it answers rpc_info with an error", _BROKEN, Level.INFO),
    "info-unreadable": Kind("its answer to rpc_info cannot be read", _BROKEN, Level.INFO),
    "dtype-mismatch": Kind("it computes in another dtype than its record says", _DEGRADED, Level.INFO),
    "version-mismatch": Kind("it runs another version than its record says", _DEGRADED, Level.INFO),
    "hidden-size-mismatch": Kind("its hidden size is not that of the model", _BROKEN, Level.INFO),
    "probe-error": Kind("petals-eval failed while looking at it: please report this", _UNKNOWN, Level.INFO),
    # of what it computes
    "info-ok-forward-fails": Kind("it answers rpc_info, and fails to compute", _BROKEN, Level.FORWARD),
    "not-finite": Kind("its answer holds NaN or infinity", _BROKEN, Level.FORWARD),
    "wrong-shape": Kind("its answer has another shape than the question", _BROKEN, Level.FORWARD),
    "wrong-answer": Kind("its answer is not what rpc_info promised: dtype, count or size", _BROKEN, Level.FORWARD),
    "adapter-fails": Kind("it fails to compute with a LoRA adapter that it announces", _DEGRADED, Level.FORWARD),
    "nondeterministic": Kind("two answers to one question: its blocks run in training mode", _BROKEN, Level.FORWARD),
    "disagrees-with-replica": Kind("most other servers of these blocks compute something else", _BROKEN, Level.FORWARD),
    "disagrees-with-home": Kind("blocks at home compute something else (--verify-local)", _BROKEN, Level.FORWARD),
    "opens-no-session": Kind("it computes, says its cache has room, and opens no session", _DEGRADED, Level.FORWARD),
    "disputed": Kind("servers of these blocks disagree, and there is no majority", _UNKNOWN, Level.FORWARD),
}  # fmt: skip


def finding(name: str, detail: str, *, level: Level | None = None) -> Finding:
    """A finding of this name. detail: may hold a peer's words."""
    kind = FINDINGS[name]
    return Finding(name, printable(detail, longest=300), kind.implies, kind.level if level is None else level)


def from_info_error(error: PeerError, blocks: str, *, is_connected: bool) -> Finding:
    """What a failed rpc_info says of a server.

    blocks: those its record names. is_connected: whether there is a connection to the peer now.
    """
    text, words = str(error).lower(), in_words(error)
    if isinstance(error, PeerUnreachableError) and _knows_no_address(text):
        return finding("record-without-server", words)
    if "protocol not supported" in text or "protocols not supported" in text:
        return finding("not-a-server", words)
    if isinstance(error, PeerUnreachableError):
        return finding("unreachable", words)
    if isinstance(error, PeerTimeoutError):
        return finding("no-answer" if is_connected else "unreachable", words)
    if isinstance(error, PeerRefusedError):
        if _does_not_hold(text):
            return finding("wrong-span", f"announces blocks {blocks}, and {words}", level=Level.INFO)
        return finding("info-refused", words)
    return finding("info-unreadable", words)


def from_forward_error(error: PeerError, blocks: str) -> Finding:
    """What a failed canary says of a server that answered rpc_info. blocks: those asked, for the message."""
    words = f"blocks {blocks}: {in_words(error)}"
    if isinstance(error, PeerAnswerError):
        if isinstance(error, PeerNotFiniteError):
            return finding("not-finite", words)
        return finding("wrong-shape" if "of shape" in str(error) else "wrong-answer", words)
    if isinstance(error, PeerRefusedError) and "does not serve" in str(error):
        return finding("wrong-span", words, level=Level.FORWARD)
    return finding("info-ok-forward-fails", words)


def _knows_no_address(text: str) -> bool:
    """libp2p's words, in lower case, for a peer that neither we nor the swarm know an address of, and for an identity
    that no peer can have."""
    not_known = ("routing: not found", "no addresses", "failed to find any peer")
    not_an_identity = ("length greater than remaining number of bytes", "multihash")
    return any(words in text for words in not_known + not_an_identity)


def _does_not_hold(text: str) -> bool:
    """Petals looks the block up in a dictionary by its uid."""
    return "keyerror" in text or "does not serve" in text

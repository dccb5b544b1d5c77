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
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.peer_text import error_text
from petals_eval.text import printable

__all__ = ["FINDINGS", "Meaning", "finding", "from_forward_error", "from_info_error", "from_trust"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the name of a finding means.

    implies: the best verdict of a server, or of a model, that has such a finding.
    level: the probe that finds it.
    """

    meaning: str
    implies: Verdict
    level: Level


_BROKEN, _UNKNOWN, _DEGRADED = Verdict.BROKEN, Verdict.UNKNOWN, Verdict.DEGRADED
_RECORD, _INFO, _FORWARD, _ROUTE = Level

FINDINGS: dict[str, Meaning] = {
    # of a model
    "not-announced": Meaning("nobody announces this model", _BROKEN, _RECORD),
    "blocks-unknown": Meaning("no index says how many blocks the model has", _UNKNOWN, _RECORD),
    "missing-blocks": Meaning("no usable server holds some of the blocks", _BROKEN, _RECORD),
    "thin-blocks": Meaning("some blocks have fewer servers than --min-replicas", _DEGRADED, _RECORD),
    "malformed-records": Meaning("records under the model's keys that cannot be read", _DEGRADED, _RECORD),
    "route-fails": Meaning("a canary did not get through all blocks", _BROKEN, _ROUTE),
    # of a server's record
    "joining": Meaning("it announces that it is still loading its blocks", _DEGRADED, _RECORD),
    "stale-record": Meaning("its record was not renewed in time, or old ones live on", _DEGRADED, _RECORD),
    "wrong-span": Meaning("it does not hold all the blocks that its record names", _BROKEN, _RECORD),
    "adapter-not-announced": Meaning("it does not announce the LoRA adapter asked for", _DEGRADED, _RECORD),
    # of what it says itself
    "record-without-server": Meaning("nobody in the swarm knows an address of it", _BROKEN, _INFO),
    "unreachable": Meaning("it has addresses, and no connection to them could be made", _BROKEN, _INFO),
    "no-answer": Meaning("it is connected and did not answer in time", _BROKEN, _INFO),
    "not-a-server": Meaning("a peer is there that does not speak the protocol of a Petals server", _BROKEN, _INFO),
    "info-refused": Meaning("it answers rpc_info with an error", _BROKEN, _INFO),
    "info-unreadable": Meaning("its answer to rpc_info cannot be read", _BROKEN, _INFO),
    "dtype-mismatch": Meaning("it computes in another dtype than its record says", _DEGRADED, _INFO),
    "version-mismatch": Meaning("it runs another version than its record says", _DEGRADED, _INFO),
    "hidden-size-mismatch": Meaning("its hidden size is not that of the model", _BROKEN, _INFO),
    "probe-error": Meaning("petals-eval failed while looking at it: please report this", _UNKNOWN, _INFO),
    # of what it computes
    "info-ok-forward-fails": Meaning("it answers rpc_info, and fails to compute", _BROKEN, _FORWARD),
    "not-finite": Meaning("its answer holds NaN or infinity", _BROKEN, _FORWARD),
    "wrong-shape": Meaning("its answer has another shape than the question", _BROKEN, _FORWARD),
    "wrong-answer": Meaning("its answer is not what rpc_info promised: dtype, count or size", _BROKEN, _FORWARD),
    "adapter-fails": Meaning("it fails to compute with a LoRA adapter that it announces", _DEGRADED, _FORWARD),
    "nondeterministic": Meaning("two answers to one question: its blocks run in training mode", _BROKEN, _FORWARD),
    "disagrees-with-replica": Meaning("most other servers of these blocks compute something else", _BROKEN, _FORWARD),
    "disagrees-with-home": Meaning("blocks at home compute something else (--verify-local)", _BROKEN, _FORWARD),
    "opens-no-session": Meaning("it computes, says its cache has room, and opens no session", _DEGRADED, _FORWARD),
    "disputed": Meaning("servers of these blocks disagree, and there is no majority", _UNKNOWN, _FORWARD),
}  # fmt: skip


def finding(name: str, detail: str, *, level: Level | None = None) -> Finding:
    """Return a finding of this name. detail: may hold a peer's words."""
    kind = FINDINGS[name]
    return Finding(name, printable(detail, longest=300), kind.implies, kind.level if level is None else level)


def from_trust(found: TrustFinding, *, voters: int, answers: int) -> Finding:
    """Return what a comparison says of a server.

    voters: servers that were compared. answers: that they gave, alike ones counted once.
    """
    blocks, apart = f"blocks {found.blocks}", f"(difference {found.difference:.2g})"
    if found.witness == "home":
        return finding("disagrees-with-home", f"{blocks} at home give another answer {apart}")
    if found.status == "disputed":
        return finding("disputed", f"{blocks}: {voters} servers give {answers} answers {apart}")
    agreeing = f"{len(found.others)} of {voters} servers agree on another answer {apart}"
    return finding("disagrees-with-replica", f"{blocks}: {agreeing}")


def from_info_error(error: PeerError, blocks: str, *, is_connected: bool) -> Finding:
    """Return what a failed rpc_info says of a server.

    blocks: those its record names. is_connected: whether there is a connection to the peer now.
    """
    text, words = str(error).lower(), error_text(error)
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
    """Return what a failed canary says of a server that answered rpc_info. blocks: those asked, for the message."""
    words = f"blocks {blocks}: {error_text(error)}"
    if isinstance(error, PeerAnswerError):
        if isinstance(error, PeerNotFiniteError):
            return finding("not-finite", words)
        return finding("wrong-shape" if "of shape" in str(error) else "wrong-answer", words)
    if isinstance(error, PeerRefusedError) and "does not serve" in str(error):
        return finding("wrong-span", words, level=Level.FORWARD)
    return finding("info-ok-forward-fails", words)


def _knows_no_address(text: str) -> bool:
    """Return whether libp2p says that neither we nor the swarm know an address of the peer, or that no peer can have
    such an identity. text: its words, in lower case."""
    not_known = ("routing: not found", "no addresses", "failed to find any peer")
    not_an_identity = ("length greater than remaining number of bytes", "multihash")
    return any(words in text for words in not_known + not_an_identity)


def _does_not_hold(text: str) -> bool:
    """Return whether a server says so: Petals looks the block up in a dictionary by its uid."""
    return "keyerror" in text or "does not serve" in text

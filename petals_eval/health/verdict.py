"""From findings to verdicts. Pure functions; the rules in one place.

A server is
- broken when a finding says that it cannot be used or answers wrongly (`FINDINGS[name].implies`);
- unknown when it was not asked as far as it takes to know: its blocks have not computed a canary, because the level was
  below `forward` or the time ran out, or two servers disagree and nobody knows which is right;
- degraded when it computes and something about it is not as it should be, and while it is joining;
- healthy when it computed, and nothing was found.

A model is, by the first rule that holds,
- broken when servers that are not broken do not hold all blocks between them, or a canary does not get through;
- unknown when those known to compute do not hold all blocks, or nobody says how many there are: it may work, and nobody
  knows;
- degraded when there is any finding, about it or about any of its servers;
- unknown when there is a server that was not asked, or the route was to be tried and was not;
- healthy otherwise.

A swarm is as its worst model, in the order healthy, degraded, unknown, broken. Without any model it is broken.
So the records' word, and an answer to rpc_info, never make anything healthy: at the levels `record` and `info` the best
verdict is unknown.
"""

from collections.abc import Container, Iterable, Sequence

from petals_eval.health.results import Finding, ServerHealth, Verdict
from petals_eval.health.settings import Level
from petals_eval.swarm.wire.span import Span, joined, spans_text

__all__ = ["NOT_BROKEN", "missing_spans", "of_model", "of_server", "of_swarm", "replicas"]

NOT_BROKEN = frozenset(Verdict) - {Verdict.BROKEN}
"""Verdicts of servers that may be used as far as they were asked."""


def of_server(findings: Iterable[Finding], has_computed: bool) -> Verdict:
    """Return the verdict on a server. has_computed: whether its whole span answered a canary."""
    implied = [each.implies for each in findings]
    if not has_computed and Verdict.BROKEN not in implied:
        return Verdict.DEGRADED if any(each.name == "joining" for each in findings) else Verdict.UNKNOWN
    return worst(implied)


def of_swarm(models: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a swarm, given those on its models."""
    found = list(models)
    return worst(found) if found else Verdict.BROKEN


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of the verdicts; healthy where there is none."""
    return max(verdicts, key=lambda each: each.badness, default=Verdict.HEALTHY)


def of_model(
    num_blocks: int, servers: Sequence[ServerHealth], findings: Sequence[Finding], level: Level, tried_route: bool
) -> tuple[Verdict, str]:
    """Return the verdict on a model, and why. findings: its own, without those of its servers."""
    possible = missing_spans(replicas(num_blocks, servers, NOT_BROKEN))
    fatal = next((each for each in findings if each.implies is Verdict.BROKEN), None)
    if fatal is not None:
        return Verdict.BROKEN, fatal.detail
    if possible or num_blocks == 0:
        return Verdict.BROKEN, f"no usable server holds blocks {spans_text(possible)}"
    proven = missing_spans(replicas(num_blocks, servers, {Verdict.HEALTHY, Verdict.DEGRADED}))
    if proven:
        return Verdict.UNKNOWN, _why_unknown(servers, level, proven)
    doubt = next((each for each in findings if each.implies is Verdict.UNKNOWN), None)
    if doubt is not None:
        return Verdict.UNKNOWN, doubt.detail
    wrong = [server for server in servers if server.findings]
    if wrong or findings:
        names = sorted({each.name for server in wrong for each in server.findings} | {each.name for each in findings})
        return Verdict.DEGRADED, ", ".join(names)
    if any(server.verdict is Verdict.UNKNOWN for server in servers):
        return Verdict.UNKNOWN, "the time ran out before every server was asked"
    if level >= Level.ROUTE and not tried_route:
        return Verdict.UNKNOWN, "the time ran out before the route was tried"
    return Verdict.HEALTHY, f"all {num_blocks} blocks compute"


def _why_unknown(servers: Sequence[ServerHealth], level: Level, unproven: Sequence[Span]) -> str:
    if level < Level.FORWARD:
        return f"no server was asked to compute (level {level.text})"
    disputed = any(each.name == "disputed" for server in servers for each in server.findings)
    reason = "servers disagree, and no majority says who is right" if disputed else "not every server was asked in time"
    return f"blocks {spans_text(unproven)}: {reason}"


def replicas(num_blocks: int, servers: Iterable[ServerHealth], verdicts: Container[Verdict]) -> tuple[int, ...]:
    """Return how many servers of each block are ONLINE and have one of these verdicts."""
    counts = [0] * num_blocks
    for server in servers:
        if server.state == "online" and server.verdict in verdicts:
            for block in range(server.start, min(server.end, num_blocks)):
                counts[block] += 1
    return tuple(counts)


def missing_spans(counts: Iterable[int]) -> tuple[Span, ...]:
    """Return the blocks that nobody holds. counts: how many servers hold each."""
    return joined(block for block, count in enumerate(counts) if not count)

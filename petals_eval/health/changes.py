"""What is different between two looks at the same swarm, in words. No I/O."""

from petals_eval.health.results import HealthReport, ModelHealth
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import printable

__all__ = ["changes"]


def changes(before: HealthReport, now: HealthReport) -> list[str]:
    """Return a line for each change that a person would want to be told; none when all is as it was."""
    old = {model.name: model for model in before.models}
    new = {model.name: model for model in now.models}
    lines = [f"{printable(name, longest=80)}: no longer announced" for name in old if name not in new]
    for name, model in new.items():
        shown = printable(name, longest=80)
        if name not in old:
            lines.append(f"{shown}: announced, {model.verdict.value}")
        else:
            lines += [f"{shown}: {line}" for line in _of_model(old[name], model)]
    states = {peer.address: peer.state for peer in before.bootstrap}
    return lines + [
        f"bootstrap peer {peer.address} {states[peer.address]} -> {peer.state}"
        for peer in now.bootstrap
        if states.get(peer.address, peer.state) != peer.state
    ]


def _of_model(old: ModelHealth, new: ModelHealth) -> list[str]:
    lines = []
    if old.verdict is not new.verdict:
        lines.append(f"{old.verdict.value} -> {new.verdict.value} ({printable(new.why)})")
    if old.covered != new.covered:
        lines.append(f"{old.covered} -> {new.covered} of {new.num_blocks} blocks")
    before = {server.peer_id: server for server in old.servers}
    after = {server.peer_id: server for server in new.servers}
    for peer_id in before.keys() - after.keys():
        lines.append(f"{short_peer(peer_id)} left (blocks {before[peer_id].span})")
    for peer_id, server in after.items():
        named = short_peer(peer_id)
        if peer_id not in before:
            lines.append(f"{named} came (blocks {server.span}), {server.verdict.value}")
            known: dict[str, str] = {}
        else:
            was = before[peer_id]
            known = {each.name: each.detail for each in was.findings}
            if was.span != server.span:
                lines.append(f"{named} moved from blocks {was.span} to {server.span}")
            if was.verdict is not server.verdict:
                lines.append(f"{named} {was.verdict.value} -> {server.verdict.value}")
        found = {each.name: each.detail for each in server.findings}
        lines += [f"{named} {name}: {printable(detail)}" for name, detail in found.items() if name not in known]
        lines += [f"{named} no longer {name}" for name in known if name not in found]
    return lines

"""The two modes as text."""

from collections.abc import Iterator, Sequence

from petals_eval.health.results import HealthReport, ServerHealth
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import plural, printable
from petals_eval.two_modes.behaviours import Behaviour
from petals_eval.two_modes.compare import Answer, Modes

__all__ = ["lines_of", "server_lines"]

_SHOWN = 12  # modules, of more the first


def lines_of(found: Modes, names: Sequence[str] = ()) -> Iterator[str]:
    """Yield what `modes` found, line by line. names: of the classes, where there are any."""
    yield from _behaviour_lines(found.behaviours)
    yield from _answer_lines("training mode", found.training, names)
    yield from _answer_lines("eval mode", found.evaluation, names)
    if found.differing is None:
        yield f"  eval mode: all {len(found.evaluation)} answers are equal bit for bit"
    else:
        yield f"  eval mode: the answers DIFFER; {printable(found.differing)} is the first module whose output does"
    for each in found.statistics[:_SHOWN]:
        yield (
            f"  running statistics of {printable(each.path)}: one pass in training mode moves the mean by up to "
            f"{each.mean:.3g}, the variance by {each.variance:.3g} (put back)"
        )
    gradients = found.gradients
    same = "the same bits" if gradients.is_equal else f"up to {gradients.largest:.2g} apart"
    yield f"with gradients and without: {same}"
    yield f"  kept for a backward pass: {gradients.bytes_kept / 1e6:.2f} MB; without gradients: 0 MB"
    for path in gradients.requires_grad[:_SHOWN]:
        yield f"  {printable(path)} asks for gradients although none are wanted"
    if found.forgotten is not None:
        passes = found.forgotten.in_training
        yield (
            f"had eval() been forgotten: accuracy {min(passes):.4f} to {max(passes):.4f} over {len(passes)} passes, "
            f"instead of {found.forgotten.in_eval:.4f}"
        )
    if found.half_precision:
        yield (
            f"note: {plural(len(found.half_precision), 'trainable parameter')} in half precision, where small steps of "
            f"training are lost: {printable(', '.join(found.half_precision[:3]))}"
        )


def _behaviour_lines(found: Sequence[Behaviour]) -> Iterator[str]:
    active = [each for each in found if each.is_active]
    idle = len(found) - len(active)
    also = f" ({plural(idle, 'dropout')} with p=0)" if idle else ""
    yield f"modules that behave differently in training mode: {len(active) or 'none'}{also}"
    for each in active[:_SHOWN]:
        what = each.kind if each.p is None else f"{each.kind} p={each.p:g}"
        where = f" ({each.attribute})" if each.attribute else ""
        yield f"  {printable(each.path) or 'the model itself'}: {each.module}, {what}{where}"
    if len(active) > _SHOWN:
        yield f"  and {len(active) - _SHOWN} more"


def _answer_lines(mode: str, answers: Sequence[Answer], names: Sequence[str]) -> Iterator[str]:
    yield f"{mode}: {plural(len(answers), 'answer')} to one input"
    yield "        class             top logit   from the first   from the mean"
    for number, each in enumerate(answers, 1):
        name = printable(names[each.predicted] if each.predicted < len(names) else str(each.predicted), longest=16)
        yield f"  {number:>4}  {name:<16}  {each.top_logit:>9.4f}   {each.from_first:>14.6f}   {each.from_mean:>13.6f}"


def server_lines(report: HealthReport) -> Iterator[str]:
    """Yield what each server of a swarm does with the same question twice."""
    for model in report.models:
        yield f"{printable(model.name)}: {plural(len(model.servers), 'server')}"
        for server in model.servers:
            yield f"  {short_peer(server.peer_id)}  blocks {server.span}  {_of_server(server)}"


def _of_server(server: ServerHealth) -> str:
    for each in server.findings:
        if each.name == "nondeterministic":
            return f"TRAINING MODE: {printable(each.detail)}"
    return "the same answer twice" if server.probes.get("forward") == "passed" else "not known: it did not compute"

"""A dry run: what an evaluation would send, and to whom. Nothing is sent."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from petals_eval.data import micro_batches
from petals_eval.errors import ExampleError
from petals_eval.evaluation.prepare import Prepared
from petals_eval.swarm.scheduling.tuning import SizePolicy
from petals_eval.tasks import show_example
from petals_eval.tasks.requests import Example, Request
from petals_eval.text import listed, printable

if TYPE_CHECKING:
    from petals_eval.model import Adapter, LocalPart
    from petals_eval.swarm.wire.records import Snapshot

__all__ = ["DryRun", "dry_run", "route_lines"]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What one adapter's evaluation would send.

    shown: the first examples as text and as tokens, with prompt and pooling positions.
    n_failed: examples that cannot be computed, among all n_examples; why_failed: the first of them.
    n_text_tokens: without prompts and padding; n_positions: with them.
    hidden_bytes: of the hidden states, in the dtype at home or the lossy wire's; they travel to each hop and back.
    prompt_bytes: of the deep prompts, which travel once, split among the hops.
    notes: what else one should know of it, a sentence each.
    Servers of a narrower dtype than the one at home are sent less.
    """

    shown: tuple[str, ...]
    n_examples: int
    n_requests: int
    n_micro_batches: int
    n_truncated: int
    n_failed: int
    why_failed: str
    n_text_tokens: int
    n_positions: int
    hidden_bytes: int
    prompt_bytes: int
    notes: tuple[str, ...] = ()

    def bytes_sent(self, hops: int) -> int:
        return self.hidden_bytes * hops + self.prompt_bytes

    def bytes_received(self, hops: int) -> int:
        return self.hidden_bytes * hops


def dry_run(prepared: Prepared, adapter: "Adapter | None", *, show: int = 2) -> DryRun:
    """Make every example as a run would, and count. Of one that cannot be computed a run notes a failure.

    show: examples. Raises what a run would raise before it sends anything.
    """
    from petals_eval.swarm.wire.codecs import LOSSY_CODES

    task, local, wire = prepared.task, prepared.side.local, prepared.side.settings.wire
    value_bytes = local.dtype.itemsize if wire is None else min(local.dtype.itemsize, LOSSY_CODES[wire].bytes_per_value)
    prefix = 0 if adapter is None else adapter.prefix_length
    at_once = prepared.tokens_per_micro_batch or SizePolicy.start // (local.hidden_size * value_bytes)
    tokenizer = local.tokenizer
    examples = task.examples(prepared.part, tokenizer)
    first = list(itertools.islice(examples, show))

    def pooled_token(input_ids: Sequence[int]) -> int:
        return local.pooled_token(input_ids, adapter)

    shown = tuple(show_example(example, tokenizer, prefix, task.label_names, pooled_token) for example in first)
    notes: dict[str, None] = {}
    counted = _Counted()

    def requests() -> Iterator[Request]:
        for example in counted.over(itertools.chain(first, examples)):
            try:
                for request in example.requests:
                    local.check_length(len(request.input_ids), prefix)
            except ExampleError as error:
                counted.fail(error)
            else:
                if task.head == "class":
                    found = (local.pooling_note(request.input_ids, adapter) for request in example.requests)
                    notes.update((note, None) for note in found if note is not None)
                yield from example.requests

    batches = positions = n_requests = 0
    boundary = local.rotary.original_length
    for batch in micro_batches(requests(), max_tokens=at_once, prefix=prefix, boundary=boundary):
        batches += 1
        n_requests += len(batch.requests)
        positions += len(batch.requests) * (prefix + batch.input_ids.shape[1])
    if counted.truncated and getattr(task, "text_pair", None) is not None:
        notes["of a pair that is too long, tokens go from the end of the longer text first"] = None
    deep_prompts = None if adapter is None else adapter.deep_prompts
    return DryRun(
        shown=shown,
        n_examples=counted.examples,
        n_requests=n_requests,
        n_micro_batches=batches,
        n_truncated=counted.truncated,
        n_failed=counted.failed,
        why_failed=counted.why_failed,
        n_text_tokens=counted.tokens,
        n_positions=positions,
        hidden_bytes=positions * local.hidden_size * value_bytes,
        notes=(*notes, *_unused_tensors(local, adapter)),
        prompt_bytes=0 if deep_prompts is None else batches * deep_prompts.numel() * local.dtype.itemsize,
    )


def _unused_tensors(local: "LocalPart", adapter: "Adapter | None") -> Iterator[str]:
    """Yield a sentence for the model and one for the prompts where their files hold tensors that nothing needs."""
    from petals_eval.model.tensor_files import shown_name

    held = [(str(local.fingerprint["model"]), local.unused)]
    if adapter is not None:
        held.append((adapter.name, adapter.unused))
    for name, unused in held:
        if unused:
            named = listed(map(shown_name, unused))
            yield f"{name} also holds tensors that are not needed and change no answer: {named}"


@dataclass(slots=True)
class _Counted:
    examples: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0
    why_failed: str = ""

    def fail(self, error: ExampleError) -> None:
        self.failed += 1
        self.why_failed = self.why_failed or str(error)

    def over(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            self.examples += 1
            self.tokens += example.n_tokens
            self.truncated += example.truncated
            yield example


def route_lines(snapshot: "Snapshot") -> list[str]:
    """Return a line for each of the servers that a run would use first, or for the blocks that nobody holds."""
    from petals_eval.swarm.directory.routing import plan_route
    from petals_eval.swarm.peers.peer_text import short_peer
    from petals_eval.swarm.wire.span import Span, spans_text

    servers = list(snapshot.servers.values())
    route = plan_route(servers, Span(0, snapshot.num_blocks), lambda server, blocks: 1.0)
    if route is None:
        return [f"no server holds blocks {spans_text(snapshot.missing())} of {snapshot.num_blocks}"]
    return [
        f"blocks {hop.span}  {short_peer(hop.server.peer_id)}"
        f"  petals {_said(hop.server.record.version)}  {_said(hop.server.record.torch_dtype)}"
        for hop in route
    ] + [f"{len(servers)} servers hold these {snapshot.num_blocks} blocks"]


def _said(text: str | None) -> str:
    return "?" if text is None else printable(text, longest=40)

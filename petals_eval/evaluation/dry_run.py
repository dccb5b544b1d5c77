"""A dry run: what an evaluation would send, and to whom. Nothing is sent."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from petals_eval.data import micro_batches
from petals_eval.errors import ExampleError
from petals_eval.evaluation.prepare import Prepared
from petals_eval.runs.results import LABELLED_KINDS, OF_TEXTS_ALONE
from petals_eval.swarm.scheduling.tuning import SizePolicy
from petals_eval.tasks import describe_example, show_example
from petals_eval.tasks.requests import Example, Request
from petals_eval.text import listed, plural, printable

if TYPE_CHECKING:
    from petals_eval.model import Adapter, LocalPart
    from petals_eval.swarm.wire.records import Snapshot

__all__ = ["DryRun", "Generating", "Route", "dry_run", "route_of"]

SHOWN_FAILURES = 5


@dataclass(frozen=True, slots=True)
class Generating:
    """What texts cost that are to be generated: at most, as if each took all the tokens that it may.

    n_new_tokens: of all texts together.
    session_positions: in sessions, which keep what was computed: each text to go on from once, then a position for each
        new token but the last. session_bytes: of their hidden states, to each hop and as much back.
    longest_session: positions that one of them reserves in each block of a server.
    forward_positions, forward_bytes: where no server opens a session, by a forward call of the whole text a token.
    """

    n_texts: int
    n_new_tokens: int
    session_positions: int
    session_bytes: int
    longest_session: int
    forward_positions: int
    forward_bytes: int


@dataclass(frozen=True, slots=True)
class DryRun:
    """What one adapter's evaluation would send.

    adapter: its name; None without prompts.
    shown: the first examples as text and as tokens, with prompt and pooling positions; described: the same as values
        that JSON can hold.
    n_examples: of them n_failed cannot be computed; failures: the first few, as (key, reason). n_unlabelled: those of
        which nobody says what is right, in kinds of task where somebody might.
    n_requests: of the examples that can be computed; most_requests: of one of them.
    n_targets: log-likelihoods wanted of the word head.
    bos_tokens: how many requests begin with so many beginning-of-text tokens; empty where the tokenizer has none.
    n_text_tokens: without prompts and padding; n_positions: with them. Neither counts texts to be generated.
    hidden_bytes: of the hidden states, in the dtype at home or the lossy wire's; they travel to each hop and back.
    prompt_bytes: of the deep prompts, which travel once, split among the hops.
    generating: what the texts to be generated cost; None where there are none.
    notes: what else one should know of it, a sentence each.
    Servers of a narrower dtype than the one at home are sent less.
    """

    adapter: str | None
    shown: tuple[str, ...]
    described: tuple[dict[str, Any], ...]
    n_examples: int
    n_requests: int
    most_requests: int
    n_micro_batches: int
    n_truncated: int
    n_unlabelled: int
    n_failed: int
    failures: tuple[tuple[str, str], ...]
    n_targets: int
    bos_tokens: Mapping[int, int]
    n_text_tokens: int
    n_positions: int
    hidden_bytes: int
    prompt_bytes: int
    generating: Generating | None = None
    notes: tuple[str, ...] = ()

    def bytes_sent(self, hops: int) -> int:
        return self.hidden_bytes * hops + self.prompt_bytes

    def bytes_received(self, hops: int) -> int:
        return self.hidden_bytes * hops

    def to_json(self) -> dict[str, object]:
        """Return all but `shown`, as values that JSON can hold."""
        found = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("shown", "described")
        }
        found["examples"] = list(self.described)
        found["bos_tokens"] = {str(count): requests for count, requests in self.bos_tokens.items()}
        found["failures"] = [{"key": key, "reason": reason} for key, reason in self.failures]
        found["generating"] = None if self.generating is None else asdict(self.generating)
        found["notes"] = list(self.notes)
        return found


def dry_run(prepared: Prepared, adapter: "Adapter | None", *, show: int = 2) -> DryRun:
    """Make every example as a run would, and count. Of one that cannot be computed a run notes a failure.

    show: examples. Raises what a run would raise before it sends anything.
    """
    from petals_eval.swarm.wire.codecs import LOSSY_CODES

    task, local, wire = prepared.task, prepared.side.local, prepared.side.settings.wire
    value_bytes = local.dtype.itemsize if wire is None else min(local.dtype.itemsize, LOSSY_CODES[wire].bytes_per_value)
    prefix = 0 if adapter is None else adapter.prefix_length
    at_once = prepared.tokens_per_micro_batch or SizePolicy.largest // (local.hidden_size * value_bytes)
    tokenizer = local.tokenizer
    examples = task.examples(prepared.part, tokenizer)
    first = list(itertools.islice(examples, show))

    def pooled_token(input_ids: Sequence[int]) -> int:
        return local.pooled_token(input_ids, adapter)

    how = (tokenizer, prefix, task.label_names, pooled_token)
    notes: dict[str, None] = {}
    # Of texts the right one is the reference: those that are to be compared may lack theirs.
    is_compared = task.kind == "generation" and any(name not in OF_TEXTS_ALONE for name in task.columns)
    answer = "label" if task.kind in LABELLED_KINDS else "reference" if is_compared else None
    counted = _Counted(prefix, getattr(tokenizer, "bos_token_id", None), answer)

    def requests() -> Iterator[Request]:
        """Yield the requests of one forward pass each; all are counted."""
        for example in itertools.chain(first, examples):
            counted.add(example)
            try:
                if example.error is not None:
                    raise example.error
                for request in example.requests:
                    local.check_request(request, prefix)
            except ExampleError as error:
                counted.fail(example, error)
                continue
            counted.add_requests(example.requests)
            if task.head == "class":
                found = (local.pooling_note(request.input_ids, adapter) for request in example.requests)
                notes.update((note, None) for note in found if note is not None)
            yield from (request for request in example.requests if request.decoding is None)

    batches = positions = 0
    boundary = local.rotary.original_length
    for batch in micro_batches(requests(), max_tokens=at_once, prefix=prefix, boundary=boundary):
        batches += 1
        positions += len(batch.requests) * (prefix + batch.input_ids.shape[1])
    if counted.truncated and getattr(task, "text_pair", None) is not None:
        notes["of a pair that is too long, tokens go from the end of the longer text first"] = None
    deep_prompts = None if adapter is None else adapter.deep_prompts
    carried = batches + counted.texts  # a session is sent them with its first step
    return DryRun(
        adapter=None if adapter is None else adapter.name,
        shown=tuple(show_example(example, *how) for example in first),
        described=tuple(describe_example(example, *how) for example in first),
        n_examples=counted.examples,
        n_requests=counted.requests,
        most_requests=counted.most_requests,
        n_micro_batches=batches,
        n_truncated=counted.truncated,
        n_unlabelled=counted.unlabelled,
        n_failed=counted.failed,
        failures=tuple(counted.failures),
        n_targets=counted.targets,
        bos_tokens=dict(sorted(counted.bos_tokens.items())),
        n_text_tokens=counted.tokens,
        n_positions=positions,
        hidden_bytes=positions * local.hidden_size * value_bytes,
        prompt_bytes=0 if deep_prompts is None else carried * deep_prompts.numel() * local.dtype.itemsize,
        generating=counted.generating(local.hidden_size, value_bytes, local.dtype.itemsize),
        notes=(
            *_draws(prepared),
            *notes,
            *_unused_tensors(local, adapter),
        ),
    )


def _draws(prepared: Prepared) -> Iterator[str]:
    draws = len({id(variant.task) for variant in prepared.variants})
    if draws > 1:
        yield f"this is the first of {draws} draws of shots; the others are of about the same size"


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
    """What a dry run counts. prefix: tuned prompt tokens. bos: the beginning-of-text token. answer: what of an example
    says what is right; None: nothing does, and it is not worth a word."""

    prefix: int
    bos: int | None
    answer: str | None
    examples: int = 0
    tokens: int = 0
    truncated: int = 0
    unlabelled: int = 0
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    requests: int = 0
    most_requests: int = 0
    targets: int = 0
    bos_tokens: Counter[int] = field(default_factory=Counter)
    texts: int = 0
    new_tokens: int = 0
    session_positions: int = 0
    longest_session: int = 0
    forward_positions: int = 0

    def add(self, example: Example) -> None:
        self.examples += 1
        self.tokens += example.n_tokens
        self.truncated += example.truncated
        self.unlabelled += self.answer is not None and getattr(example, self.answer) is None

    def fail(self, example: Example, error: ExampleError) -> None:
        self.failed += 1
        if len(self.failures) < SHOWN_FAILURES:
            self.failures.append((example.key, str(error)))

    def add_requests(self, requests: Sequence[Request]) -> None:
        self.requests += len(requests)
        self.most_requests = max(self.most_requests, len(requests))
        for request in requests:
            self.targets += len(request.targets)
            if self.bos is not None:
                self.bos_tokens[sum(1 for _ in itertools.takewhile(self.bos.__eq__, request.input_ids))] += 1
            if request.decoding is not None:
                self._add_text(request)

    def _add_text(self, request: Request) -> None:
        in_session, new_tokens = self.prefix + request.positions, request.new_tokens
        self.texts += 1
        self.new_tokens += new_tokens
        self.session_positions += in_session
        self.longest_session = max(self.longest_session, in_session)
        # The first call has the text alone, the last one all but the last token.
        self.forward_positions += new_tokens * (self.prefix + len(request.input_ids) + in_session) // 2

    def generating(self, hidden_size: int, value_bytes: int, session_value_bytes: int) -> Generating | None:
        """Return what the texts cost. A session is lossless, whatever the wire."""
        if not self.texts:
            return None
        return Generating(
            n_texts=self.texts,
            n_new_tokens=self.new_tokens,
            session_positions=self.session_positions,
            session_bytes=self.session_positions * hidden_size * session_value_bytes,
            longest_session=self.longest_session,
            forward_positions=self.forward_positions,
            forward_bytes=self.forward_positions * hidden_size * value_bytes,
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Who would compute.

    lines: one for each of the servers that a run would use first, or why there are none. missing: blocks (first, stop)
    that nobody holds.
    """

    lines: tuple[str, ...]
    missing: tuple[tuple[int, int], ...] = ()
    is_reachable: bool = True

    @property
    def is_complete(self) -> bool:
        """Whether a run could begin now."""
        return self.is_reachable and not self.missing


def route_of(snapshot: "Snapshot") -> Route:
    """Return who would compute, by the records of the servers that may be used."""
    from petals_eval.swarm.directory.routing import plan_route
    from petals_eval.swarm.peers.peer_text import short_peer
    from petals_eval.swarm.wire.span import Span, spans_text

    servers = list(snapshot.servers.values())
    route = plan_route(servers, Span(0, snapshot.num_blocks), lambda server, blocks: 1.0)
    if route is None:
        missing = snapshot.missing()
        line = f"no server holds blocks {spans_text(missing)} of {snapshot.num_blocks}"
        return Route((line,), tuple((span.start, span.stop) for span in missing))
    hops = [
        f"blocks {hop.span}  {short_peer(hop.server.peer_id)}"
        f"  petals {_said(hop.server.record.version)}  {_said(hop.server.record.torch_dtype)}"
        for hop in route
    ]
    return Route((*hops, f"{plural(len(servers), 'server')} hold these {snapshot.num_blocks} blocks"))


def _said(text: str | None) -> str:
    return "?" if text is None else printable(text, longest=40)

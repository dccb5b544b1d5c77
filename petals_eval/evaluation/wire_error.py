"""What a lossy wire did to a run: how far it moves answers on a sample, and which servers did not take it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from petals_eval.data import Rows, sample
from petals_eval.errors import ExampleError
from petals_eval.evaluation.prepare import Prepared, Variant
from petals_eval.runs.folder import RunFolder
from petals_eval.runs.manifest import LosslessServer, WireRecord, WireSample
from petals_eval.tasks import Task
from petals_eval.tasks.requests import Example, Generated, as_float64
from petals_eval.tasks.windows import Windows

if TYPE_CHECKING:
    import numpy as np
    import torch

    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel

__all__ = ["SAMPLE", "Answers", "answers_to", "compared", "lossless", "note_lossless_servers", "note_sample"]

SAMPLE = 16  # examples that are computed both ways
WINDOWS = 8  # of a document at most: nobody should read one of a million tokens three times for this

_NO_TEXTS = (
    "texts are generated in sessions, which are lossless whatever the wire; only where no server opens one do they go "
    "by forward calls over this wire"
)

Answers = dict[str, "list[torch.Tensor | Generated]"]
"""Of each example, by its key, in the order of its requests."""


def note_sample(prepared: Prepared, folder: RunFolder, model: "RemoteModel", *, on_tick: Callable[[], object]) -> None:
    """Once a run on a lossy wire: compute a sample lossless as well, and note in the run folder how far answers moved.

    Not of texts that are generated: it would take hundreds of steps of other people's servers to compare two sessions,
    both of them lossless.

    Raises SwarmError.
    """
    wire = model.blocks.settings.wire
    if wire is None or (folder.manifest.wire is not None and folder.manifest.wire.sample is not None):
        return
    variant = prepared.variants[0]
    if variant.task.kind == "generation":
        found = WireSample(variant.name, 0, None, None, None, f"not measured: {_NO_TEXTS}")
    else:
        try:
            found = _measured(model, sample(prepared.rows, SAMPLE, prepared.seed), variant, on_tick)
        except ExampleError as error:
            found = WireSample(variant.name, 0, None, None, None, f"not measured: {error}")
    folder.note_wire(replace(folder.manifest.wire or WireRecord(wire), sample=found))


def note_lossless_servers(model: "RemoteModel", folder: RunFolder) -> list[str]:
    """Note in the run folder which servers take the code and which do not; a line for each new one that does not.

    A server that did not take it in an earlier part of the run stays noted.
    """
    if model.blocks.settings.wire is None:
        return []
    from petals_eval.swarm.peers.peer_text import short_peer

    peers = list(model.blocks.peers.values())
    before = folder.manifest.wire or WireRecord(model.blocks.settings.wire)
    known = {server.peer_id for server in before.lossless}
    new = [
        LosslessServer(peer.peer_id, peer.codec_refusal)
        for peer in peers
        if peer.codec_refusal is not None and peer.peer_id not in known
    ]
    takers = sorted(peer.peer_id for peer in peers if peer.has_taken_codec)
    taken_by = tuple(dict.fromkeys([*before.taken_by, *takers]))
    folder.note_wire(replace(before, lossless=(*before.lossless, *new), taken_by=taken_by))
    return [
        f"note: server {short_peer(server.peer_id)} does not take --wire {before.name} ({server.reason}): "
        "hidden states travel lossless to it and back"
        for server in new
    ]


def _measured(
    model: "RemoteModel",
    rows: Rows,
    variant: Variant,
    on_tick: Callable[[], object],
) -> WireSample:
    name, prompts, task = variant
    examples = [shortened(each) for each in task.examples(rows, model.local.tokenizer) if each.error is None]
    if not examples:
        return WireSample(name, 0, None, None, None, "not measured: no example can be computed")
    with lossless(model) as beside:
        exact = answers_to(beside, examples, prompts, on_tick)
    moved = answers_to(model, examples, prompts, on_tick)
    return compared(task, name, examples, exact, moved)


@contextlib.contextmanager
def lossless(model: "RemoteModel") -> "Iterator[RemoteModel]":
    """Connect the model once more for the body, to the same swarm without the lossy wire. Raises SwarmError.

    Its answers are not audited: they are there to be compared.
    """
    from petals_eval.remote_model import RemoteModel
    from petals_eval.swarm import SwarmConnection

    settings = model.blocks.settings.model_copy(update={"wire": None, "verify": 0.0})
    with SwarmConnection.connect(settings) as connection:
        blocks = connection.remote_sequential(model.blocks.dht_prefix, len(model.blocks))
        yield RemoteModel(model.local, blocks)


def shortened(example: Example) -> Example:
    """Return an example as it is compared: all of it, or of a document its first windows."""
    if not isinstance(example.requests, Windows):
        return example
    return replace(example, requests=example.requests[:WINDOWS])


def compared(task: Task, adapter: str, examples: Sequence[Example], exact: Answers, moved: Answers) -> WireSample:
    """Return how far answers moved, exact ones on the way to those of a lossy wire."""
    import numpy as np

    pairs = [(before, after) for key in exact for before, after in zip(exact[key], moved[key], strict=True)]
    differences = [np.abs(_numbers(after) - _numbers(before)) for before, after in pairs]
    every, predictions = np.concatenate(differences), _changed_predictions(task, examples, exact, moved)
    return WireSample(adapter, len(examples), float(every.max()), float(every.mean()), predictions)


def _numbers(answer: "torch.Tensor | Generated") -> "np.ndarray":
    """Return the logits or log-likelihoods of an answer, without what it says of greedy decoding."""
    numbers = as_float64(answer)
    return numbers if numbers.ndim == 1 else numbers[:, 0]


def _changed_predictions(task: Task, examples: Sequence[Example], exact: Answers, moved: Answers) -> int | None:
    """Count the predictions that differ; None where this kind of task predicts nothing."""
    both = [(task.predict(each, exact[each.key]), task.predict(each, moved[each.key])) for each in examples]
    if all(before.prediction is None for before, _ in both):
        return None
    return sum(before.prediction != after.prediction for before, after in both)


def answers_to(
    model: "RemoteModel",
    examples: Sequence[Example],
    adapter: "Adapter | None",
    on_tick: Callable[[], object],
    tokens_per_micro_batch: int | None = None,
) -> Answers:
    """Return the answers by the key of their example, in the order of its requests: by forward calls, as nothing else
    is to differ.

    Raises SwarmError, ExampleError for the first one that nobody can compute.
    """
    requests = [request for example in examples for request in example.requests]
    answered = model.compute(
        requests, adapter, tokens_per_micro_batch=tokens_per_micro_batch, on_tick=on_tick, in_lanes=False
    )
    found = {(each.request.key, each.request.part): each.answer for each in answered}
    return {example.key: [found[example.key, request.part] for request in example.requests] for example in examples}

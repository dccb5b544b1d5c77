"""A model without a swarm, for what the evaluator makes of answers and of errors."""

import itertools
from types import SimpleNamespace

import torch

import petals_eval
from petals_eval.data import DataSource
from petals_eval.errors import DeadlineError, RequestTooLargeError
from petals_eval.remote_model import RequestAnswer
from petals_eval.swarm import ServedHop, SwarmStatus
from petals_eval.swarm.wire.span import Span
from petals_eval.tasks import ClassificationTask
from tests.support.fake_swarm import PEER

ROWS = 6
TASK = ClassificationTask(name="tiny", text="{text}", label_column="label", label_names=("bad", "good"))


class Tokenizer:
    """A token a word."""

    truncation_side = "right"

    def __call__(self, texts, **options):
        return {"input_ids": [list(range(1, 1 + len(text.split()))) for text in texts]}


class FakeModel:
    """Answers `until` requests of each adapter, then finds no server any more.

    context: tokens the model reads. takes: tokens a server takes. sent: what was asked for, (key, part).
    """

    def __init__(self, until=None, adapters=(), context=100, takes=100, **swarm_settings):
        self.adapters = adapters
        self.config_dropout = {}
        fingerprint = {"model": "tiny", "revision": None, "dtype": "float32", "sha256": "aa", "lm_head_sha256": None}
        self.until, self.context, self.takes = until, context, takes
        self.sent = []
        self.local = SimpleNamespace(
            tokenizer=Tokenizer(),
            fingerprint=fingerprint,
            pooling=None,
            logit_cap=None,
            check_request=self.check_request,
            check_head=lambda head, adapter: None,
            class_outputs=lambda adapter: None,
            own_label_names=lambda adapter: None,
            pooling_note=lambda input_ids, adapter: None,
        )
        self.blocks = SimpleNamespace(
            settings=petals_eval.SwarmSettings(initial_peers=(PEER,), **swarm_settings),
            dht_prefix="tiny",
            status=lambda: SwarmStatus(0, ("a",), None),
            settle=lambda on_tick: on_tick(),
            replaceable=lambda peer_ids: (),
        )

    def positions_at_once(self):
        return 64

    def check_request(self, request, prefix):
        tokens = len(request.input_ids)
        if tokens + prefix > self.context:
            raise RequestTooLargeError(f"this model reads {self.context} tokens at most, found {tokens + prefix}")

    def compute(self, requests, adapter, *, on_tick, on_failed, **options):
        on_tick()
        requests = iter(requests)
        for request in itertools.islice(requests, self.until):
            self.sent.append((request.key, request.part))
            if len(request.input_ids) > self.takes:
                on_failed(request, RequestTooLargeError(f"no server takes {len(request.input_ids)} tokens"))
            else:
                yield from answers_of("a", [request])
        if next(requests, None) is not None:
            raise DeadlineError("stopped at the deadline")


def fake_adapter(name, kind="ptune", **more):
    """Prompts by their name alone."""
    return SimpleNamespace(**{"name": name, "kind": kind, "sha256": name, "prefix_length": 0, "task": None} | more)


def answers_of(name, requests, answer=(0.0, 1.0)):
    for request in requests:
        yield RequestAnswer(request, torch.tensor(answer), (ServedHop(name, Span(0, 4), "2.2.0", "float32", None),))


def write_rows(path, words=(1,) * ROWS):
    """A file of rows with so many words each; the labels are good and bad in turns."""
    lines = [f"{' '.join(['fine'] * count)},{('good', 'bad')[index % 2]}" for index, count in enumerate(words)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return DataSource(path=str(path))


def evaluate(model, source, out, task=TASK, **options):
    return petals_eval.evaluate(model, task=task, data=source, out=out, **options)

"""The batches of a loader against Hugging Face's own loop and scikit-learn, and over a model without a swarm."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.utils.data import DataLoader

import petals_eval
from petals_eval.data.batches import NOT_SCORED
from petals_eval.errors import (
    AdapterError,
    ConfigError,
    DataError,
    ModelError,
    NotFiniteError,
    PetalsEvalError,
    RequestTooLargeError,
)
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm import SwarmStatus
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.wire.span import Span
from tests.fake_model import FakeModel, answers_of, fake_adapter
from tests.model.reference import causal_lm
from tests.support.fake_swarm import server

NAME = "stories260K-hf"
ROWS = 96
PAD = 2  # the tokenizer has none; whoever pads Llama takes the end of text


@pytest.fixture(scope="module")
def remote(realdata):
    adapters = [realdata / "adapters" / name for name in ("trec-ptune-peft", "trec-ptune")]
    with (
        LocalSwarm(realdata / NAME, servers=2, mode="thread", dht_prefix=NAME) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            realdata / NAME, adapter=adapters, initial_peers=swarm.initial_peers, dht_prefix=NAME, dtype="float32"
        ) as model,
    ):
        yield model


@pytest.fixture(scope="module")
def plain(remote):
    """The model as it is, without prompts, over the same servers."""
    return petals_eval.RemoteModel(remote.local, remote.blocks)


@pytest.fixture(scope="module")
def whole(realdata):
    return causal_lm(realdata / NAME)


@pytest.fixture(scope="module")
def questions(realdata, remote):
    lines = (realdata / "trec/TREC.test.all").read_text("latin-1").splitlines()[:ROWS]
    labels, texts = zip(*(line.split(" ", 1) for line in lines), strict=True)
    ids = remote.local.tokenizer(list(texts), truncation=True, max_length=96)["input_ids"]
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]


@pytest.fixture(scope="module")
def stories(realdata, remote):
    """Paragraphs as tokens; of each the first third is a prompt, which is not scored."""
    texts = [text for text in (realdata / "tinystories/validation.txt").read_text().split("\n\n") if text.strip()][:24]
    rows = []
    for ids in remote.local.tokenizer(texts, truncation=True, max_length=80)["input_ids"]:
        given = max(1, len(ids) // 3)
        rows.append({"input_ids": ids, "labels": [NOT_SCORED] * given + ids[given:]})
    return rows


def loader_of(rows, side, batch_size=16):
    """A DataLoader that pads the way collators do."""

    def padded(values, length, filler):
        gap = [filler] * (length - len(values))
        return gap + values if side == "left" else values + gap

    def collate(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([padded(row["input_ids"], longest, PAD) for row in batch])
        mask = torch.tensor([padded([1] * len(row["input_ids"]), longest, 0) for row in batch])
        labels = [
            row["labels"] if isinstance(row["labels"], int) else padded(row["labels"], longest, NOT_SCORED)
            for row in batch
        ]
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}

    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)


def with_prompts(whole, adapter, batch):
    """Embeddings, mask and positions with an adapter's prompts in front, as PEFT gives them to the model."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompts = adapter.prompts.expand(len(ids), -1, -1)
    mask = torch.cat([torch.ones(prompts.shape[:2], dtype=mask.dtype), mask], dim=1)
    embeds = torch.cat([prompts, whole.get_input_embeddings()(ids)], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def own_predictions(whole, adapter, loader):
    """Hugging Face's model under an evaluation loop as anybody would write it, with the adapter's head on top."""
    predictions, labels = [], []
    for batch in loader:
        hidden = whole.model(**with_prompts(whole, adapter, batch)).last_hidden_state
        mask = batch["attention_mask"]
        last = adapter.prefix_length + (mask * torch.arange(mask.shape[1])).argmax(1)
        logits = hidden[torch.arange(len(mask)), last] @ adapter.head_weight.T
        predictions += logits.argmax(-1).tolist()
        labels += batch["labels"].tolist()
    return labels, predictions


@pytest.mark.parametrize("side", ["left", "right"])
def test_classes_are_those_of_hugging_faces_loop_and_the_numbers_scikit_learns(side, remote, whole, questions):
    labels, predictions = own_predictions(whole, remote.adapters[0], loader_of(questions, side))
    assert len(set(predictions)) > 3
    accuracy = sklearn.metrics.accuracy_score(labels, predictions)
    for average in ("macro", "micro", "weighted"):
        found = petals_eval.evaluate_batches(remote, loader_of(questions, side), average=average)
        f1 = sklearn.metrics.f1_score(labels, predictions, average=average)
        assert found == {"accuracy": accuracy, "f1": pytest.approx(f1, abs=1e-12), "n": ROWS}
    assert petals_eval.evaluate_batches(remote, loader_of(questions, side))["f1"] == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro")
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [None, "trec-ptune-peft"])
@torch.no_grad()
def test_the_loss_is_hugging_faces_own(side, name, remote, plain, whole, stories):
    adapter = remote.adapters[0] if name else None
    total, count = 0.0, 0
    for batch in loader_of(stories, side, batch_size=5):
        labels, given = batch["labels"], batch
        if adapter is not None:
            given = with_prompts(whole, adapter, batch)
            before = torch.full((len(labels), adapter.prefix_length), NOT_SCORED)
            labels = torch.cat([before, labels], dim=1)
        loss = whole(**{key: value for key, value in given.items() if key != "labels"}, labels=labels).loss
        scored = int((labels[:, 1:] != NOT_SCORED).sum())
        total, count = total + float(loss) * scored, count + scored
    found = petals_eval.evaluate_batches(remote if name else plain, loader_of(stories, side, batch_size=5))
    assert found["n_tokens"] == count > 500
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert all(type(value) in (int, float) for value in found.values())


def test_every_module_is_in_the_mode_it_was_in(remote, questions):
    remote.local.train()
    remote.local.norm.eval()
    try:
        assert petals_eval.evaluate_batches(remote, loader_of(questions, "right"), limit_batches=1)["n"] == 16
        assert [module for module in remote.local.modules() if not module.training] == [remote.local.norm]
        assert not torch.is_inference_mode_enabled()
    finally:
        remote.local.eval()


def test_an_adapter_is_chosen_by_its_name_and_batches_are_limited(remote, whole, questions):
    second = remote.adapters[1]
    labels, predictions = own_predictions(whole, second, loader_of(questions[:32], "right"))

    told = []

    class Display:
        def update(self, done, retries=0, servers=0, message=None):
            told.append(done)

        def waiting(self, message):
            pass

    found = petals_eval.evaluate_batches(
        remote, loader_of(questions, "right"), adapter=second.name, limit_batches=2, progress=Display()
    )
    assert found == {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "f1": pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro")),
        "n": 32,
    }
    assert max(told) == 32


def test_a_head_that_is_not_there_is_told_before_anything_is_sent(plain, questions):
    with pytest.raises(AdapterError, match="there is no trained head"):
        petals_eval.evaluate_batches(plain, loader_of(questions, "right"))


# -- over a model without a swarm


class Fake(FakeModel):
    """Answers by the head of its adapters: as many scores as `answer` has."""

    def __init__(self, answer=(0.0, 1.0), outputs=None, **options):
        super().__init__(**options)
        self.answer = answer
        self.local.embeddings = SimpleNamespace(weight=torch.zeros(50, 1))
        self.local.class_outputs = lambda adapter: outputs

    def compute(self, requests, adapter, *, on_tick, on_failed, **options):
        for request in requests:
            self.sent.append(request.input_ids)
            if len(request.input_ids) > self.takes:
                on_failed(request, RequestTooLargeError("no server takes it"))
            yield from answers_of("a", [request], self.answer)


BATCH = {"input_ids": [[1, 2], [1, 3], [1, 4]], "labels": [1, 0, 1]}


def test_binary_f1_is_scikit_learns_default_and_rows_without_a_class_are_left_out():
    model = Fake()
    found = petals_eval.evaluate_batches(model, [{**BATCH, "labels": [1, 0, NOT_SCORED]}, BATCH], average="binary")
    assert found == {"accuracy": 3 / 5, "f1": sklearn.metrics.f1_score([1, 0, 1, 0, 1], [1] * 5), "n": 5}
    assert len(model.sent) == 5


def test_a_training_around_it_draws_the_same_numbers():
    """Also where its loader shuffles, which draws from torch's generator."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loader = DataLoader([BATCH] * 3, batch_size=None, shuffle=True)
    assert petals_eval.evaluate_batches(Fake(), loader)["n"] == 9
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    next(iter(loader))
    assert before[2] != torch.get_rng_state().tolist()


def test_what_a_server_computed_that_was_caught_is_computed_again():
    model = Fake()
    caught = TrustFinding(server("a", 0, 4), "nondeterministic", Span(0, 4), 0.1)

    def compute(requests, adapter, **options):
        for number, request in enumerate(requests):
            model.sent.append(request.input_ids)
            is_again = model.blocks.status().findings
            yield from answers_of("b" if is_again or number else "a", [request], (0.0, 1.0) if is_again else (1.0, 0.0))
        model.blocks.status = lambda: SwarmStatus(0, ("a", "b"), None, findings=(caught,))

    model.compute = compute
    found = petals_eval.evaluate_batches(model, [BATCH])
    assert model.sent == [(1, 2), (1, 3), (1, 4), (1, 2)]
    # The first row is predicted as 1 now, and the others, by another server, still as 0.
    assert found == {"accuracy": 2 / 3, "f1": pytest.approx(2 / 3), "n": 3}


def test_notices_are_told_once(caplog):
    model = Fake()
    model.blocks.status = lambda: SwarmStatus(0, ("a",), None, notices=("a server is slow",))
    model.blocks.settle = lambda on_tick: [on_tick(), on_tick()]
    petals_eval.evaluate_batches(model, [BATCH])
    assert [record.getMessage() for record in caplog.records] == ["a server is slow"]


TOKENS = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "said"),
    [
        (Fake(), [BATCH], {"average": "samples"}, ConfigError, "average: .*(found 'samples')"),
        (Fake(), [BATCH], {"adapter": 7}, ConfigError, "adapter: expected text .found 7"),
        (Fake(), [BATCH], {"adapter": "mine"}, ConfigError, "adapter: expected none, .* found 'mine'"),
        (
            Fake(adapters=[fake_adapter("prompts")]),
            [BATCH],
            {"adapter": "promts"},
            ConfigError,
            "adapter: expected one of prompts, found 'promts'. Did you mean prompts?",
        ),
        (Fake(), [BATCH], {"limit_batches": 0}, ConfigError, "limit_batches: expected more than 0 .found 0"),
        (Fake(), [BATCH], {"limit_batches": "all"}, ConfigError, "limit_batches: expected a whole number"),
        (Fake(), [BATCH], {"tokens_per_micro_batch": -1}, ConfigError, "tokens_per_micro_batch: expected more than 0"),
        (Fake(), [BATCH], {"progress": 3}, ConfigError, "progress: expected True, or an object with the methods"),
        (Fake(), 7, {}, ConfigError, "loader: expected an iterable of batches, .* found int"),
        (Fake(), BATCH, {}, DataError, "batch 0: expected a mapping .* A single batch goes into a list"),
        (Fake(), [], {}, DataError, "expected batches with labels to score, found none"),
        (Fake(), [{**BATCH, "labels": [-100] * 3}], {}, DataError, "expected batches with labels to score, found none"),
        (Fake(), [{**BATCH, "labels": [0, 1, 2]}], {}, DataError, "batch 0, row 2: the label is 2; .* from 0 to 1"),
        (Fake(outputs=2), [{**BATCH, "labels": [0, 1, 2]}], {}, DataError, "batch 0, row 2: the label is 2"),
        (Fake(), [{**BATCH, "labels": [0, -1, 1]}], {}, DataError, "batch 0, row 1: the label is -1"),
        (
            Fake(),
            [{**BATCH, "input_ids": [[1], [2], [50]]}],
            {},
            DataError,
            "batch 0, row 2: input_ids holds the token 50",
        ),
        (Fake((0.5,)), [BATCH], {}, AdapterError, "the head gives one number, as one for regression does"),
        (Fake(outputs=1), [BATCH], {}, AdapterError, "the head gives one number, as one for regression does"),
        (Fake((0.0, 1.0, 2.0)), [BATCH], {"average": "binary"}, ConfigError, "binary is for two classes, .* gives 3"),
        (Fake((0.0, math.nan)), [BATCH], {}, NotFiniteError, "batch 0, row 0: expected finite scores"),
        (Fake((math.inf, 0.0)), [TOKENS], {}, NotFiniteError, "batch 0, row 0: expected finite scores"),
        (
            Fake(context=2),
            [BATCH, TOKENS | {"labels": [1]}],
            {},
            RequestTooLargeError,
            "batch 1, row 0: this model reads 2",
        ),
        (Fake(takes=1), [BATCH], {}, RequestTooLargeError, "batch 0, row 0: no server takes it"),
        (torch.nn.Linear(2, 2), [BATCH], {}, ConfigError, "expected a petals_eval.RemoteModel or a Petals model"),
        ("bigscience/bloom", [BATCH], {}, ConfigError, "expected a petals_eval.RemoteModel or a Petals model"),
    ],
)
def test_what_cannot_be_meant_is_an_error_of_ours(model, loader, options, error, said):
    with pytest.raises(error, match=said) as caught:
        petals_eval.evaluate_batches(model, loader, **options)
    assert isinstance(caught.value, PetalsEvalError) and caught.value.exit_code == 2


def test_an_error_of_the_loader_comes_through():
    def broken():
        yield BATCH
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        petals_eval.evaluate_batches(Fake(), broken())


def test_a_word_head_that_is_not_there():
    model = Fake()

    def refuse(head, adapter):
        if head == "lm":
            raise ModelError("the LM head is needed")

    model.local.check_head = refuse
    with pytest.raises(ModelError, match="the LM head is needed"):
        petals_eval.evaluate_batches(model, [TOKENS])
    assert petals_eval.evaluate_batches(model, [BATCH])["n"] == 3


def test_a_likelihood_beyond_all_bounds_is_an_infinite_perplexity():
    found = petals_eval.evaluate_batches(Fake((-2000.0, -1000.0)), [TOKENS])
    assert found == {"loss": 1500.0, "perplexity": math.inf, "n_tokens": 2}

"""Perplexity over a swarm is that of Hugging Face's own forward, and of PEFT's for its prompts, window by window."""

import contextlib
import itertools
import json
import math

import pytest
import torch

import petals_eval
from petals_eval import RemoteModel
from petals_eval.data import rows_of
from petals_eval.errors import DeadlineError
from petals_eval.evaluation.dry_run import dry_run
from petals_eval.evaluation.prepare import prepare
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import LocalModel
from petals_eval.remote_model import LocalSide
from petals_eval.tasks import PerplexityTask
from tests.model.reference import causal_lm, full_logits, local_answers, make_adapter
from tests.support.tiny_models import FAMILIES, make_tiny

PARAGRAPHS, A_DOCUMENT = 100, 40  # two documents and what is left over
PREFIX = 8


def task_of(**changes) -> PerplexityTask:
    return PerplexityTask(**{"name": "stories", "text": "{text}", "rows_per_document": A_DOCUMENT, **changes})


@pytest.fixture(scope="module")
def paragraphs(realdata) -> list[str]:
    return (realdata / "tinystories" / "validation.txt").read_text().split("\n\n")[:PARAGRAPHS]


@pytest.fixture(scope="module")
def stories(paragraphs, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="module")
def documents(paragraphs) -> list[str]:
    return ["\n\n".join(paragraphs[at : at + A_DOCUMENT]) for at in range(0, PARAGRAPHS, A_DOCUMENT)]


@pytest.fixture(scope="module")
def model(realdata, causal_prompt):
    """The model with the prompt that PEFT trained, over two servers."""
    folder = realdata / "stories260K-hf"
    with (
        LocalSwarm(str(folder), spans=[(0, 2), (2, 5)], mode="thread", dht_prefix="stories") as swarm,
        RemoteModel.from_pretrained(
            str(folder), initial_peers=tuple(swarm.initial_peers), adapter=str(causal_prompt), dht_prefix="stories"
        ) as remote,
    ):
        yield remote


@pytest.fixture(scope="module")
def whole(realdata):
    return causal_lm(realdata / "stories260K-hf")


@pytest.fixture(scope="module")
def tuned(realdata, causal_prompt):
    import peft

    return peft.PeftModel.from_pretrained(causal_lm(realdata / "stories260K-hf"), causal_prompt).eval()


@contextlib.contextmanager
def without_adapter(model):
    adapters, model.adapters = model.adapters, ()
    try:
        yield model
    finally:
        model.adapters = adapters


@torch.no_grad()
def one_by_one(logits_of, document: list[int], longest: int, context: int) -> list[float]:
    """The likelihood of each token after the first, by a plain loop. document: its start token and its own."""
    found: list[float] = []
    while (done := len(found)) < len(document) - 1:
        end = min(len(document) - 1, done + (longest - context + 1 if done else longest))
        begin = max(0, end - longest)
        logits = logits_of(torch.tensor([document[begin:end]])).double().log_softmax(-1)
        found += [logits[at - begin, document[at + 1]].item() for at in range(done, end)]
    return found


def lines(folder) -> dict[str, dict]:
    return {line["key"]: line for line in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())}


@pytest.mark.parametrize(("context", "bos"), [(1, "auto"), (1, "never"), (200, "auto")])
def test_documents_are_as_hugging_face_computes_them(model, whole, stories, documents, tmp_path, context, bos):
    with without_adapter(model):
        result = petals_eval.evaluate(model, task=task_of(context=context, bos=bos), data=stories, out=tmp_path / "run")
    found = lines(tmp_path / "run")
    assert list(found) == ["0", "1", "2"]
    total, tokens = 0.0, 0
    for document, line in zip(documents, found.values(), strict=True):
        ids = model.local.tokenizer(document, add_special_tokens=bos == "auto")["input_ids"]
        expected = one_by_one(lambda each: whole(input_ids=each).logits[0], [1, *ids], 512, context)
        assert line["tokens"] == len(ids) == len(expected)
        assert line["log_likelihood"] == pytest.approx(math.fsum(expected), rel=1e-6)
        empty = document[0].isspace() + document[-1].isspace()  # words, as the harness counts them
        assert (line["words"], line["bytes"]) == (len(document.split()) + empty, len(document.encode()))
        total, tokens = total + math.fsum(expected), tokens + len(ids)
    size = len("".join(documents).encode())
    assert result.metrics["token_perplexity"].value == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert result.metrics["bits_per_byte"].value == pytest.approx(-total / size / math.log(2), rel=1e-6)
    low, high = result.metrics["bits_per_byte"].ci95
    assert low < result.metrics["bits_per_byte"].value < high


@pytest.fixture(scope="module")
def quiet(model, stories, tmp_path_factory):
    """A run of which nothing becomes, with the prompt and without it, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "quiet"
    return petals_eval.evaluate(model, task=task_of(), data=stories, out=folder, without_prompts=True), folder


def test_a_causal_prompt_of_peft_is_as_peft_computes_it(model, whole, tuned, documents, quiet):
    [adapter] = model.adapters
    assert (adapter.kind, adapter.prefix_length, adapter.head_weight) == ("peft-prompt_tuning", PREFIX, None)
    result, folder = quiet
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"]["max_length"] == 512 - PREFIX

    def by_peft(ids):
        return tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, PREFIX:]

    files = {"predictions.jsonl": by_peft, "predictions.without-the-prompts.jsonl": lambda ids: whole(ids).logits[0]}
    for name, logits_of in files.items():
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for document, line in zip(documents, found, strict=True):
            sequence = [1, *model.local.tokenizer(document)["input_ids"]]
            expected = one_by_one(logits_of, sequence, 512 - PREFIX, 1)
            assert line["log_likelihood"] == pytest.approx(math.fsum(expected), rel=1e-6)
    # The prompt matters, by far more than what is allowed above.
    bare = result.without_prompts.metrics["token_perplexity"].value
    assert result.metrics["token_perplexity"].value != pytest.approx(bare, rel=1e-4)


def test_every_token_is_as_peft_computes_it(model, tuned, documents):
    [adapter] = model.adapters
    task = task_of(rows_per_document=1).bound_to(512 - PREFIX)
    [example] = task.examples(rows_of([{"text": documents[0]}]), model.local.tokenizer)
    answers = {each.request.part: each.answer for each in model.compute(example.requests, adapter)}
    found = torch.cat([answers[part] for part in range(len(example.requests))]).double()
    expected = one_by_one(
        lambda ids: tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, PREFIX:],
        [1, *model.local.tokenizer(documents[0])["input_ids"]],
        512 - PREFIX,
        1,
    )
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["none", "deep_ptune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, kind, tmp_path):
    """BLOOM reads any number of tokens; the others 40 here, prompts among them."""
    limit = {} if family == "bloom" else {"max_position_embeddings": 40}
    folder = make_tiny(family, tmp_path, **limit)
    local, whole = LocalModel.from_pretrained(str(folder)), causal_lm(folder)
    adapter = make_adapter(local, kind)
    prefix = 0 if adapter is None else adapter.prefix_length
    longest = 2048 if local.context is None else 40 - prefix
    task = task_of(rows_per_document=1, context=5).bound_to(None if local.context is None else longest)
    text = "it is a great yes, no bad it is, the good great is it no good the yes " * 2
    [example] = task.examples(rows_of([{"text": text}]), local.tokenizer)
    answers = [answer for each in example.requests for answer in local_answers(whole, local, adapter, [each])]
    document = [1, *local.tokenizer(text)["input_ids"]]
    expected = one_by_one(lambda ids: full_logits(whole, local, adapter, ids[0].tolist()), document, longest, 5)
    [(likelihood, tokens, _, _)] = task.predict(example, answers).values
    assert len(example.requests) == (1 if family == "bloom" else 1 + math.ceil((tokens - longest) / (longest - 4)))
    assert likelihood == pytest.approx(math.fsum(expected), rel=1e-6)


def stop_after(monkeypatch, model, answers):
    compute = model.compute

    def some(requests, adapter, **options):
        with contextlib.closing(compute(requests, adapter, **options)) as computed:
            yield from itertools.islice(computed, answers)
        raise DeadlineError("stopped at the deadline")

    monkeypatch.setattr(model, "compute", some)


def test_a_run_that_was_stopped_goes_on_with_whole_documents(model, stories, quiet, tmp_path, monkeypatch):
    options = {"task": task_of(), "data": stories, "tokens_per_micro_batch": 600}
    expected, folder = quiet
    windows = [line["n_tokens"] // 504 for line in lines(folder).values()]
    with monkeypatch.context() as patch, pytest.raises(DeadlineError) as stopped:
        stop_after(patch, model, sum(windows) - 3)
        petals_eval.evaluate(model, out=tmp_path / "run", **options)
    [note] = stopped.value.__notes__
    kept = int(note.split()[0])
    assert 0 < kept < 3
    asked = []
    compute = model.compute

    def counting(requests, adapter, **options):
        return compute((asked.append(each.key) or each for each in requests), adapter, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model, "compute", counting)
        result = petals_eval.evaluate(model, out=tmp_path / "run", **options)
    assert len(set(asked)) == 3 - kept
    assert result.first.n_scored == 3
    for name, metric in result.metrics.items():
        assert metric.value == pytest.approx(expected.metrics[name].value, rel=1e-6)
        assert metric.ci95 == pytest.approx(expected.metrics[name].ci95, rel=1e-6)


def test_parts_of_a_run_hold_whole_documents(model, stories, quiet, tmp_path):
    parts = [tmp_path / "one", tmp_path / "two"]
    for index, part in enumerate(parts, 1):
        petals_eval.evaluate(model, task=task_of(), data=stories, out=part, shard=f"{index}/2")
        assert len(lines(part)) == 3 - index
    merged = petals_eval.merge(parts, out=tmp_path / "merged")
    result, folder = quiet
    found, expected = lines(tmp_path / "merged"), lines(folder)
    assert list(found) == list(expected)
    for key, line in expected.items():
        assert found[key]["row_hash"] == line["row_hash"]
        assert found[key]["log_likelihood"] == pytest.approx(line["log_likelihood"], rel=1e-6)
    assert merged.metrics["word_perplexity"].ci95 == pytest.approx(result.metrics["word_perplexity"].ci95, rel=1e-6)


def test_a_limit_counts_documents(model, stories, documents, tmp_path):
    petals_eval.evaluate(model, task=task_of(), data=stories, limit=2, out=tmp_path / "run")
    found = lines(tmp_path / "run")
    assert len(found) == 2
    assert all(line["bytes"] == len(documents[int(key)].encode()) for key, line in found.items())


def test_a_dry_run_counts_windows(model, stories, documents):
    side = LocalSide(model.local, model.adapters, model.blocks.settings, "stories")
    prepared = prepare(lambda: side, task=task_of(), data=stories)
    [variant] = prepared.variants
    counted = dry_run(prepared, variant.adapter, show=0)
    tokens = [len(model.local.tokenizer(document)["input_ids"]) for document in documents]
    windows = [math.ceil(count / 504) for count in tokens]
    assert (counted.n_examples, counted.n_requests, counted.n_failed) == (3, sum(windows), 0)
    # Each window is full: the last of a document sees as much of what comes before as fits.
    assert counted.n_text_tokens == 504 * sum(windows)
    assert counted.n_positions >= 512 * sum(windows)


def test_windows_longer_than_this_model_reads_are_told_before_anything_is_sent(model, stories):
    side = LocalSide(model.local, model.adapters, model.blocks.settings, "stories")
    with pytest.raises(petals_eval.errors.TaskError, match="max_length: should be at most 504"):
        prepare(lambda: side, task=task_of(), data=stories, max_length=505)
    assert prepare(lambda: side, task=task_of(), data=stories, max_length=504).task.fingerprint()["max_length"] == 504

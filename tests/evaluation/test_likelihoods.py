"""Runs of choices and continuations over a swarm: against a plain loop, interrupted, in parts, and with bad rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import petals_eval
import petals_eval.evaluation.wire_error
from petals_eval.data import DataSource, sample
from petals_eval.errors import ConfigError, InterruptedRunError, TaskError
from petals_eval.evaluation.dry_run import dry_run
from petals_eval.evaluation.prepare import prepare
from petals_eval.remote_model import LocalSide
from petals_eval.runs import RunFolder
from petals_eval.tasks import ChoiceTask, ContinuationTask
from tests.fake_model import fake_adapter
from tests.model.reference import causal_lm
from tests.support.real_swarm import STORIES, ProgressLines, predictions, stories_swarm

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mutual_info")
COPA = ChoiceTask(
    name="copa", text="{premise}", choices=("{choice1}", "{choice2}"), label_column="label", metrics=ACCURACIES
)


@pytest.fixture(scope="module")
def swarm(realdata):
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as started:
        yield started


def connected(realdata, swarm, **settings):
    """The real model as it is, over the swarm's two servers."""
    peers = {"initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix}
    return petals_eval.RemoteModel.from_pretrained(str(realdata / STORIES), **peers, **settings)


@pytest.fixture(scope="module")
def model(realdata, swarm):
    with connected(realdata, swarm) as remote:
        yield remote


@pytest.fixture(scope="module")
def whole(realdata):
    return causal_lm(realdata / STORIES)


@pytest.fixture(scope="module")
def copa(realdata, tmp_path_factory):
    """COPA's rows of both files."""
    folder = realdata / "copa"
    path = tmp_path_factory.mktemp("copa") / "copa.jsonl"
    path.write_text((folder / "dev.jsonl").read_text() + (folder / "test.jsonl").read_text())
    return DataSource(path=str(path))


@torch.inference_mode()
def likelihood(whole, tokenizer, context, answer):
    """(sum of log-likelihoods, whether all are greedy, tokens) of an answer by one forward of the whole text."""
    if context:
        tokens, first = tokenizer.encode(context + answer), len(tokenizer.encode(context))
    else:
        tokens, first = [tokenizer.bos_token_id, *tokenizer.encode(answer, add_special_tokens=False)], 1
    logits = whole(torch.tensor([tokens])).logits[0].log_softmax(-1)
    values = [logits[at - 1, tokens[at]].item() for at in range(first, len(tokens))]
    greedy = all(logits[at - 1].argmax().item() == tokens[at] for at in range(first, len(tokens)))
    return sum(values), greedy, len(values)


def test_copa_is_what_a_plain_loop_over_hugging_faces_forward_gives(model, whole, copa, tmp_path):
    result = petals_eval.evaluate(model, task=COPA, data=copa, out=tmp_path / "run")
    assert (result.first.n_scored, result.first.n_failed) == (150, 0)
    lines = predictions(tmp_path / "run")
    rows = [json.loads(line) for line in Path(copa.path).read_text().splitlines()]
    right = dict.fromkeys(ACCURACIES, 0)
    for line, row in zip(lines, rows, strict=True):
        choices = (row["choice1"], row["choice2"])
        told = [likelihood(whole, model.local.tokenizer, row["premise"], f" {choice}") for choice in choices]
        alone = [likelihood(whole, model.local.tokenizer, "", f" {choice}")[0] for choice in choices]
        sums, tokens = np.array([each[0] for each in told]), [each[2] for each in told]
        assert line["log_likelihood"] == pytest.approx(sums.tolist(), abs=1e-4)
        assert line["unconditioned"] == pytest.approx(alone, abs=1e-4)
        assert (line["tokens"], line["characters"]) == (tokens, [len(choice) for choice in choices])
        assert line["prediction"] == sums.argmax() and line["label"] == row["label"]
        scores = {
            "acc": sums,
            "acc_norm": sums / [len(choice) for choice in choices],
            "acc_bytes": sums / [len(choice.encode()) for choice in choices],
            "acc_tokens": sums / tokens,
            "acc_mutual_info": sums - alone,
        }
        for name, each in scores.items():
            right[name] += each.argmax() == row["label"]
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        name: count / 150 for name, count in right.items()
    }
    assert "acc (per character)" in (tmp_path / "run" / "report.md").read_text()


def test_an_interrupted_run_of_choices_gives_the_numbers_of_a_quiet_one_and_so_do_its_parts(model, copa, tmp_path):
    options = {"task": COPA, "data": copa, "tokens_per_micro_batch": 256}
    quiet = petals_eval.evaluate(model, out=tmp_path / "quiet", **options)
    progress = ProgressLines()

    def interrupt(done):
        if done >= 40:
            raise KeyboardInterrupt

    progress.on_update = interrupt
    with pytest.raises(InterruptedRunError):
        petals_eval.evaluate(model, out=tmp_path / "run", progress=progress, **options)
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = petals_eval.evaluate(model, out=tmp_path / "run", **options)
    for index in (1, 2):
        petals_eval.evaluate(model, out=tmp_path / f"part{index}", shard=f"{index}/2", **options)
    merged = petals_eval.merge([tmp_path / "part2", tmp_path / "part1"], out=tmp_path / "merged")

    lines = predictions(tmp_path / "quiet")
    for result, folder in ((resumed, "run"), (merged, "merged")):
        assert result.metrics == quiet.metrics
        for line, other in zip(lines, predictions(tmp_path / folder), strict=True):
            # A row in a micro-batch of another size may differ in its last bits.
            assert other["log_likelihood"] == pytest.approx(line["log_likelihood"], abs=1e-4)
            assert {**other, "log_likelihood": 0, "unconditioned": 0} == {
                **line,
                "log_likelihood": 0,
                "unconditioned": 0,
            }


def test_the_last_words_of_sentences(model, whole, realdata, tmp_path):
    stories = (realdata / "tinystories" / "validation.txt").read_text().split("\n")
    sentences = [line.split(".")[0] for line in stories if 40 < len(line.split(".")[0]) < 200][:40]
    path = tmp_path / "words.jsonl"
    rows = [dict(zip(("context", "word"), sentence.rsplit(" ", 1), strict=True)) for sentence in sentences]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ContinuationTask(
        name="words", text="{context}", target="{word}", metrics=("perplexity", "token_perplexity", "acc")
    )
    result = petals_eval.evaluate(model, task=task, data=path, out=tmp_path / "run")
    told = [likelihood(whole, model.local.tokenizer, row["context"], f" {row['word']}") for row in rows]
    for line, (total, greedy, tokens) in zip(predictions(tmp_path / "run"), told, strict=True):
        assert line["log_likelihood"] == pytest.approx(total, abs=1e-4)
        assert (line["is_greedy"], line["tokens"], line["label"], line["prediction"]) == (greedy, tokens, None, None)
    assert 0 < sum(greedy for _, greedy, _ in told) < len(told)
    total, tokens = sum(each[0] for each in told), sum(each[2] for each in told)
    assert result.metrics["perplexity"].value == pytest.approx(np.exp(-total / len(told)), rel=1e-5)
    assert result.metrics["token_perplexity"].value == pytest.approx(np.exp(-total / tokens), rel=1e-5)
    assert result.metrics["acc"].value == sum(greedy for _, greedy, _ in told) / len(told)
    assert result.first.n_unlabelled == 0 and result.first.label_names == ()


def test_rows_that_cannot_be_asked_are_failures_and_the_others_are_scored(model, tmp_path):
    rows = [
        {"q": "I see th", "choices": ["e", "at"], "label": 0},
        {"q": "Tom ran.", "choices": [" He fell.", " He sat."], "label": 1},
        {"q": "once upon a time " * 200, "choices": [" He fell.", " He sat."], "label": 1},
        {"q": "Tom ran.", "choices": [" He fell.", " He sat.", " He fell."], "label": None},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ChoiceTask(
        name="t", text="{q}", choices_column="choices", label_column="label", delimiter="", unlabelled="predict"
    )
    result = petals_eval.evaluate(model, task=task, data=path, out=tmp_path / "run")
    first = result.first
    assert (first.n_examples, first.n_scored, first.n_failed, first.n_unlabelled) == (4, 2, 2, 1)
    failures = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [failure["key"] for failure in failures] == ["0", "2"]
    assert "begins inside a token" in failures[0]["reason"]
    assert "expected 512 at most, which is what the model reads beside its prompts" in failures[1]["reason"]
    assert [len(line["log_likelihood"]) for line in predictions(tmp_path / "run")] == [2, 3]

    prepared = prepare(lambda: LocalSide(model.local, (), model.blocks.settings, "x"), task=task, data=path)
    plan = dry_run(prepared, None)
    assert (plan.n_examples, plan.n_failed, plan.n_requests) == (4, 2, 4)
    assert [key for key, _ in plan.failures] == ["0", "2"] and "begins inside a token" in plan.failures[0][1]
    assert plan.n_unlabelled == 1


def test_cutting_leaves_the_same_room_for_every_adapter(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"q": "once upon a time " * 200, "choices": [" He fell.", " He sat."], "label": 1}) + "\n"
    )
    task = ChoiceTask(
        name="t", text="{q}", choices_column="choices", label_column="label", delimiter="", too_long="cut"
    )
    result = petals_eval.evaluate(model, task=task, data=path, out=tmp_path / "run")
    assert (result.first.n_scored, result.first.n_truncated) == (1, 1)

    adapter = fake_adapter("a", prefix_length=16, head_weight=None)
    side = LocalSide(model.local, (adapter,), model.blocks.settings, "x")
    [example] = prepare(lambda: side, task=task, data=path, without_prompts=False).first_examples
    assert [len(request.input_ids) for request in example.requests] == [512 - 16, 512 - 16]


def test_thresholds_name_metrics_that_the_kind_has(model, copa):
    def prepared(*fail_under, task=COPA):
        side = LocalSide(model.local, (), model.blocks.settings, "x")
        return prepare(lambda: side, task=task, data=copa, fail_under=fail_under)

    with pytest.raises(ConfigError, match="accuracy needs choices that all rows share"):
        prepared("accuracy=0.5")
    alone = COPA.model_copy(update={"metrics": ("acc",)})
    assert prepared("acc_norm=0.5", task=alone).task.metrics == ("acc", "acc_norm")
    assert len(prepared("acc_mutual_info=0.5", task=alone).first_examples[0].requests) == 4
    contexts = ChoiceTask(
        name="t", contexts=("{premise} {choice1}", "{premise} {choice2}"), continuation="The end.", label_column="label"
    )
    with pytest.raises(TaskError, match="acc is that number"):
        prepared("acc_mutual_info=0.5", task=contexts)


def test_a_lossy_wire_is_measured_on_the_rows_that_can_be_asked(realdata, swarm, tmp_path, monkeypatch):
    rows = [
        {"q": "I see th", "choices": ["e", "at"], "label": 0},
        {"q": "Tom ran.", "choices": [" He", " A"], "label": 1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ChoiceTask(name="t", text="{q}", choices_column="choices", label_column="label", delimiter="")
    with connected(realdata, swarm, wire="float16") as model:
        petals_eval.evaluate(model, task=task, data=path, out=tmp_path / "both")
        monkeypatch.setattr(petals_eval.evaluation.wire_error, "sample", lambda rows, limit, seed: sample(rows, 1, 1))
        petals_eval.evaluate(model, task=task, data=path, out=tmp_path / "one")
    samples = {}
    for name in ("both", "one"):
        with RunFolder.open(tmp_path / name) as folder:
            samples[name] = folder.manifest.wire.sample
    assert samples["both"].examples == 1 and 0 < samples["both"].largest < 0.1
    assert (samples["one"].examples, samples["one"].note) == (0, "not measured: no example can be computed")

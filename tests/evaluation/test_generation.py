"""Whole evaluations of generated texts: resumed, in parts, over a server that lies, with and without their texts."""

import json

import pytest
import torch

import petals_eval
from petals_eval.errors import ConfigError, InterruptedRunError
from petals_eval.local_swarm.faults.catalog import Noise
from petals_eval.model import LocalModel
from petals_eval.runs import RunFolder
from petals_eval.tasks import GenerationTask
from tests.model.reference import causal_lm
from tests.support.real_swarm import STORIES, stories_swarm
from tests.support.waiting import until

NEW, ROWS = 12, 12
TASK = GenerationTask(
    name="stories",
    text="{begin}",
    answer_column="end",
    max_new_tokens=NEW,
    stop=("!",),
    metrics=("exact_match", "token_f1"),
)


@pytest.fixture(scope="module")
def rows(realdata, tmp_path_factory):
    """Beginnings of stories; what is right of every second one is what Hugging Face writes."""
    folder = realdata / STORIES
    whole, tokenizer = causal_lm(folder), LocalModel.from_pretrained(str(folder)).tokenizer
    stories = [
        story for story in (realdata / "tinystories" / "validation.txt").read_text().split("\n\n") if story.strip()
    ]
    made = []
    for index, story in enumerate(stories[:ROWS]):
        begin = " ".join(story.split()[: 3 + index % 5])
        ids = tokenizer(begin)["input_ids"]
        found = whole.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()
        text = tokenizer.decode(found[len(ids) :], skip_special_tokens=True).split("!")[0]
        made.append({"begin": begin, "end": text if index % 2 else f"not {text}", "text": text})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path, made


@pytest.fixture(scope="module")
def swarm(realdata):
    with stories_swarm(realdata, [(0, 3), (3, 5)]) as running:
        yield running


@pytest.fixture(scope="module")
def model(realdata, swarm):
    with connected(realdata, swarm) as remote:
        yield remote


@pytest.fixture(scope="module")
def quiet(model, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quiet"
    return out, evaluate(model, rows, out)


def connected(realdata, swarm, **settings):
    return petals_eval.RemoteModel.from_pretrained(
        str(realdata / STORIES), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, **settings
    )


def evaluate(model, rows, out, *, task=TASK, save_texts=True, **options):
    return petals_eval.evaluate(model, task=task, data=str(rows[0]), out=out, save_texts=save_texts, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Interrupt:
    """Ctrl-C once so many rows are scored."""

    def __init__(self, after):
        self.after = after

    def update(self, done, retries=0, servers=0, message=None):
        if done >= self.after:
            raise KeyboardInterrupt

    def waiting(self, message):
        raise RuntimeError(message)


def test_the_numbers_are_those_of_hugging_faces_texts(quiet, rows):
    out, result = quiet
    assert result.metrics["exact_match"].value == 0.5
    assert 0.5 < result.metrics["token_f1"].value < 1
    stopped = result.metrics["stopped_by_length"].value
    assert [line["text"] for line in lines(out / "texts.jsonl")] == [row["text"] for row in rows[1]]
    assert stopped == sum(line["finish"] == "length" for line in lines(out / "texts.jsonl")) / ROWS
    predictions = lines(out / "predictions.jsonl")
    assert [line["key"] for line in predictions] == [str(index) for index in range(ROWS)]
    assert all("text" not in line and {"exact_match", "token_f1", "new_tokens"} <= line.keys() for line in predictions)


def test_without_being_asked_no_text_is_kept(model, rows, tmp_path):
    result = evaluate(model, rows, tmp_path / "run", save_texts=False)
    assert result.metrics["exact_match"].value == 0.5
    assert not (tmp_path / "run" / "texts.jsonl").exists()
    for path in (tmp_path / "run").iterdir():
        assert not any(row["text"].encode() in path.read_bytes() for row in rows[1]), path


def test_texts_that_are_kept_come_back_with_the_predictions(model, quiet, rows):
    out, result = quiet
    finishes = [line["finish"] for line in lines(out / "texts.jsonl")]
    for found in (result, evaluate(model, rows, None)):
        assert [each.text for each in found.predictions] == [row["text"] for row in rows[1]]
        assert [each.finish for each in found.predictions] == finishes


def test_an_interrupted_run_goes_on_at_whole_rows_with_the_same_texts(model, rows, quiet, tmp_path):
    with pytest.raises(InterruptedRunError):
        evaluate(model, rows, tmp_path / "run", progress=Interrupt(3))
    with RunFolder.open(tmp_path / "run") as folder:
        kept = folder.journal.done_keys("no prompts")
        assert 3 <= len(kept) < ROWS
        assert folder.texts("no prompts").keys() >= kept
    until(lambda: all(peer.cache.held == 0 for peer in model.blocks.peers.values()), 5.0)
    result = evaluate(model, rows, tmp_path / "run")
    assert result.metrics == quiet[1].metrics
    for name in ("texts.jsonl", "predictions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (quiet[0] / name).read_bytes()
    with RunFolder.open(tmp_path / "run") as folder:
        assert next(folder.journal._select("SELECT count(*) FROM scored"))[0] == ROWS, "each once"


def test_parts_of_a_run_merge_into_the_run_in_one_piece(model, rows, quiet, tmp_path):
    parts = [tmp_path / f"part {index}" for index in (1, 2)]
    for index, part in enumerate(parts, start=1):
        evaluate(model, rows, part, shard=f"{index}/2")
    merged = petals_eval.merge(parts, out=tmp_path / "merged")
    assert merged.metrics == quiet[1].metrics
    assert (tmp_path / "merged" / "texts.jsonl").read_bytes() == (quiet[0] / "texts.jsonl").read_bytes()


def test_a_server_that_lies_in_its_sessions_is_found_out_and_nothing_of_its_counts(realdata, rows, quiet, tmp_path):
    with stories_swarm(realdata, [(0, 3), (3, 5), (0, 3), (3, 5)]) as swarm:
        liar = swarm.add_server((0, 5), faults=(Noise(size=0.05),))
        with connected(realdata, swarm) as model:
            result = evaluate(model, rows, tmp_path / "run")
        assert liar.fault_counts()["noise"].in_flight > 0
    assert [(each.peer_id, each.verdict, each.is_used) for each in result.noisy_servers] == [
        (liar.peer_id, "liar", False)
    ]
    assert result.metrics == quiet[1].metrics
    for name in ("texts.jsonl", "predictions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (quiet[0] / name).read_bytes()


def test_a_row_that_cannot_be_generated_is_a_failure_of_that_row(model, rows, tmp_path):
    long = TASK.model_copy(update={"max_new_tokens": 506})
    shortest = min(range(ROWS), key=lambda index: len(rows[1][index]["begin"]))
    data = [dict(rows[1][shortest], begin="Once"), dict(rows[1][0], begin="one two three four five six seven eight")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    result = evaluate(model, (path, data), tmp_path / "run", task=long)
    assert (result.first.n_scored, result.first.n_failed) == (1, 1)
    [failure] = lines(tmp_path / "run" / "failures.jsonl")
    assert failure["key"] == "1" and "506 new ones come to" in failure["reason"]


def test_a_run_of_another_kind_keeps_no_texts(model, realdata):
    with pytest.raises(ConfigError, match="--save-texts: task trec generates no texts"):
        petals_eval.evaluate(
            model, task="trec", data=str(realdata / "trec" / "TREC.test.all"), save_texts=True, limit=5
        )

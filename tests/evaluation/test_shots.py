"""Runs with shots: which rows leave the evaluation, draws and their mean, parts, resuming, and prepared rows."""

import json

import pytest

import petals_eval
from petals_eval.config import PromptSettings
from petals_eval.data import DataSource, rows_of
from petals_eval.errors import ConfigError, DataError, DeadlineError, ModelError, RunFolderError, TaskError
from petals_eval.evaluation.prepare import prepare
from petals_eval.evaluation.shots import rows_and_shots, with_prompt
from petals_eval.tasks import ClassificationTask, PerplexityTask
from petals_eval.tasks.row_code import RowCode
from tests.fake_model import FakeModel, Tokenizer, fake_adapter

COUNT = 30
ROW = [{"text": "my own", "label": "good"}]


class Words(Tokenizer):
    """A token a word, the same for the same word, so that prompts can be told apart."""

    bos_token = None
    bos_token_id = None
    chat_template = None

    def __call__(self, texts, **options):
        if isinstance(texts, str):
            return {"input_ids": [hash(word) % 100_003 for word in texts.split()]}
        return {"input_ids": [self(text)["input_ids"] for text in texts]}


@pytest.fixture
def source(tmp_path):
    """A file of rows whose labels are good and bad in turns."""
    path = tmp_path / "rows.csv"
    lines = [f"film {index},{('good', 'bad')[index % 2]}" for index in range(COUNT)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return DataSource(path=str(path))


def task(**changes):
    values = {"text": "{text} is", "label_column": "label", "label_names": ("bad", "good"), "metrics": ("accuracy",)}
    return ClassificationTask(**{"name": "films", **values, **changes})


def model(**options):
    made = FakeModel(context=1000, takes=1000, **options)
    made.local.tokenizer = Words()
    return made


def evaluate(source, out=None, made=None, **options):
    options.setdefault("task", task())
    return petals_eval.evaluate(made or model(), data=source, out=out, **options)


def side(made=None):
    made = made or model()
    return petals_eval.remote_model.LocalSide(made.local, tuple(made.adapters), made.blocks.settings, "tiny")


def prepared(source, **options):
    shown = {name: options.pop(name) for name in tuple(options) if name in PromptSettings.model_fields}
    options.setdefault("task", task())
    return prepare(side, data=source, prompt=PromptSettings(**shown), is_kept=False, **options)


def texts(run):
    return {each.key: each.text for variant in run.variants for each in variant.task.examples(run.part, Words())}


def lines_of(folder, name="predictions.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_shots_of_the_evaluated_rows_leave_the_evaluation_and_the_run_says_how_many(source, tmp_path):
    said = []

    class Progress:
        def update(self, done, retries=0, servers=0, message=None):
            said.append(message)

        def waiting(self, message):
            pass

    result = evaluate(source, tmp_path / "run", shots=4, progress=Progress())
    assert result.first.n_examples == COUNT - 4
    assert "note: 4 rows of rows.csv are shots and are left out of the evaluation" in said
    run = prepared(source, shots=4)
    shots = {shot.index for shot in run.variants[0].task._draw.rows_for(next(iter(run.rows)))}
    assert {line["key"] for line in lines_of(tmp_path / "run")} == {str(n) for n in range(COUNT)} - set(map(str, shots))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["run_settings"]["rows_left_out"] == 4
    assert manifest["data"]["rows"] == COUNT - 4


def test_a_limit_counts_rows_that_are_no_shots_and_draws_the_same_rows_otherwise(source):
    plain, with_shots = prepared(source, limit=20), prepared(source, limit=20, shots=3)
    before, after = ({row.index for row in run.rows} for run in (plain, with_shots))
    assert len(before) == len(after) == 20
    shots = {shot.index for shot in with_shots.variants[0].task._draw.rows_for(next(iter(plain.rows)))}
    assert not shots & after
    assert before - shots <= after


def test_shots_stand_in_the_prompt_with_their_label_names(source):
    run = prepared(source, shots=2, shots_seed=5)
    [first, second] = run.variants[0].task._draw.rows_for(next(iter(run.rows)))
    front = "".join(f"{shot.columns['text']} is {shot.columns['label']}\n\n" for shot in (first, second))
    assert texts(run) == {str(row.index): f"{front}{row.columns['text']} is" for row in run.rows}


def test_shots_from_another_file(source, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nthe first,good\nthe second,bad\n")
    run = prepared(source, shots=2, shots_data=tmp_path / "train.csv")
    assert len(run.part) == COUNT
    assert run.notes == ()
    [text] = {text.replace(f"film {key}", "film") for key, text in texts(run).items()}
    assert text in (
        "the first is good\n\nthe second is bad\n\nfilm is",
        "the second is bad\n\nthe first is good\n\nfilm is",
    )


def test_the_same_file_under_another_name_holds_the_evaluated_rows(source, tmp_path):
    from pathlib import Path

    (tmp_path / "again.csv").write_bytes(Path(source.path).read_bytes())
    assert len(prepared(source, shots=2, shots_data=str(tmp_path / "again.csv")).part) == COUNT - 2


def part_of(source, tmp_path, rows):
    """A file with the first of the rows, some of them a second time at its end."""
    from pathlib import Path

    head, *lines = Path(source.path).read_text().splitlines()
    (tmp_path / "part.csv").write_text("\n".join([head, *lines[:rows], *lines[:2]]) + "\n")
    return DataSource(path=str(tmp_path / "part.csv"))


@pytest.mark.parametrize("draws", [1, 2])
def test_rows_that_equal_a_shot_out_of_a_file_with_more_of_them_leave_the_evaluation(source, tmp_path, draws):
    part = part_of(source, tmp_path, 20)
    run = prepared(part, shots=9, shots_data=source.path, draws=draws)
    shots = {shot.columns["text"] for each in run.variants for shot in each.task._draw.rows_for(next(iter(run.part)))}
    kept = [row.columns["text"] for row in run.part]
    assert not shots & set(kept)
    whole = [f"film {n}" for n in (*range(20), 0, 1)]
    assert kept == [text for text in whole if text not in shots]
    left_out = len(whole) - len(kept)
    assert 2 <= left_out == run.manifest.run_settings["rows_left_out"]
    which = " of one of the 2 draws" if draws == 2 else ""
    assert f"{left_out} rows of part.csv equal shots{which} and are left out of the evaluation" in run.notes
    limited = prepared(part, shots=9, shots_data=source.path, draws=draws, limit=5)
    assert not shots & {row.columns["text"] for row in limited.part}
    assert len(limited.part) == 5


def test_a_copy_of_a_shot_leaves_the_evaluation_with_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "the same,good\n" * 3 + "another,bad\n")
    run = prepared(DataSource(path=str(path)), task=task(shots={"count": 1, "draw": "first"}))
    assert [row.columns["text"] for row in run.part] == ["another"]


@pytest.mark.parametrize("how", ["row", "lm_eval"])
def test_no_row_is_its_own_shot_out_of_a_file_with_more_of_them(source, tmp_path, how):
    run = prepared(part_of(source, tmp_path, 20), task=task(shots={"count": 25, "draw": how}), shots_data=source.path)
    assert len(run.part) == 22
    for row in run.part:
        assert row.columns["text"] not in {s.columns["text"] for s in run.variants[0].task._draw.rows_for(row)}


def test_a_split_of_the_same_folder(tmp_path):
    for split, words in (("train", "one two three"), ("test", "four five")):
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": word, "label": "good"}) + "\n" for word in words.split())
        )
    folder = DataSource(path=str(tmp_path), split="test")
    run = prepared(folder, shots=3)
    assert len(run.part) == 2
    shown = next(iter(texts(run).values()))
    assert all(f"{word} is good\n\n" in shown for word in ("one", "two", "three"))
    assert len(prepared(folder, shots=1, shots_split="test").part) == 1
    with pytest.raises(DataError, match=r"shots: .* has no split 'validation'"):
        prepared(folder, shots=1, shots_split="validation")


def test_a_file_has_no_splits_and_the_run_says_where_shots_come_from(source):
    run = prepared(source, shots=2, shots_split="train")
    assert run.notes[0] == "shots are drawn from the evaluated rows: rows.csv has no split train"
    assert len(run.part) == COUNT - 2


def test_shots_of_rows_in_memory(source):
    rows = [{"text": f"film {index}", "label": ("good", "bad")[index % 2]} for index in range(COUNT)]
    assert petals_eval.evaluate(model(), task=task(), data=rows, shots=2).first.n_examples == COUNT - 2


def test_shots_that_the_task_writes_out(source):
    own = task(shots={"rows": [{"text": "my own", "label": "good"}]})
    run = prepared(source, task=own)
    assert len(run.part) == COUNT
    assert texts(run)["3"] == "my own is good\n\nfilm 3 is"


@pytest.mark.parametrize("how", ["row", "lm_eval"])
def test_parts_have_the_prompts_of_the_whole(source, how):
    own = task(shots={"count": 3, "draw": how})
    whole = texts(prepared(source, task=own))
    assert len(whole) == COUNT
    parts = [texts(prepared(source, task=own, shard=f"{index}/3")) for index in (1, 2, 3)]
    assert {key: text for part in parts for key, text in part.items()} == whole
    assert not any(f"film {key} is good" in text or f"film {key} is bad" in text for key, text in whole.items())


def test_parts_of_a_run_with_shots_are_merged_to_the_whole(source, tmp_path):
    options = {"shots": 4, "draws": 2}
    whole = evaluate(source, tmp_path / "whole", **options)
    for index in (1, 2):
        evaluate(source, tmp_path / f"part{index}", shard=f"{index}/2", **options)
    merged = petals_eval.merge([tmp_path / "part1", tmp_path / "part2"], out=tmp_path / "merged")
    assert merged.metrics == whole.metrics
    for name in ("predictions.no-prompts-draw-1.jsonl", "predictions.no-prompts-draw-2.jsonl"):
        assert (tmp_path / "merged" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_several_draws_give_their_mean_and_spread(source, tmp_path):
    result = evaluate(source, tmp_path / "run", shots=4, draws=3)
    assert list(result.adapters) == ["no prompts"]
    draws = result.first.draws
    assert [each.adapter for each in draws] == [f"no prompts, draw {number}" for number in (1, 2, 3)]
    values = [each.metrics["accuracy"].value for each in draws]
    metric = result.metrics["accuracy"]
    assert metric.value == pytest.approx(sum(values) / 3)
    assert metric.draws.values == tuple(values)
    # None is scored on the shots of another one.
    [rows] = {
        frozenset(line["key"] for line in lines_of(tmp_path / "run", f"predictions.no-prompts-draw-{n}.jsonl"))
        for n in (1, 2, 3)
    }
    left_out = COUNT - len(rows)
    assert 4 < left_out <= 12
    assert result.first.n_examples == 3 * len(rows)
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved["metrics"]["accuracy"]["draws"]["values"] == values
    assert [each["adapter"] for each in saved["draws"]] == [each.adapter for each in draws]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Draws of shots: no prompts" in report
    assert "no prompts, draw 3" in report


def test_the_predictions_of_all_draws_are_in_the_result(source):
    result = evaluate(source, task=task(shots=2), draws=3)
    of_draws = [draw.predictions for draw in result.first.draws]
    assert all(len(each) == draw.n_scored for each, draw in zip(of_draws, result.first.draws, strict=True))
    assert result.predictions == (*of_draws[0], *of_draws[1], *of_draws[2]) != ()


def test_each_draw_is_the_run_of_its_seed(source):
    """All have the same rows: those that are shots of none of the draws."""
    several = prepared(source, shots=4, draws=3, shots_seed=10)
    for number, variant in enumerate(several.variants):
        alone = texts(prepared(source, shots=4, shots_seed=10 + number))
        found = {each.key: each.text for each in variant.task.examples(several.part, Words())}
        assert found.items() <= alone.items()


def test_a_run_of_several_draws_goes_on_where_it_stopped(source, tmp_path):
    quiet = evaluate(source, tmp_path / "quiet", shots=3, draws=2)
    with pytest.raises(DeadlineError):
        evaluate(source, tmp_path / "run", model(until=9), shots=3, draws=2)
    for change in ({"shots_seed": 1}, {"draws": 3}, {"shots": 4}, {"system": "Be brief."}):
        with pytest.raises(RunFolderError, match="found another"):
            evaluate(source, tmp_path / "run", **{"shots": 3, "draws": 2, **change})
    resumed = model()
    again = evaluate(source, tmp_path / "run", resumed, shots=3, draws=2)
    assert again.metrics == quiet.metrics
    assert len(resumed.sent) == again.first.n_examples - 9


def test_without_prompts_each_draw_is_evaluated_too(source, tmp_path):
    adapter = fake_adapter("mine", without_prompts=lambda: fake_adapter("bare", "none"))
    result = evaluate(source, tmp_path / "run", model(adapters=[adapter]), shots=3, draws=2, without_prompts=True)
    assert list(result.adapters) == ["mine"]
    assert len(result.without_prompts.draws) == 2
    assert (tmp_path / "run" / "predictions.without-the-prompts-draw-2.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"draws": 2}, ConfigError, "draws: there are no shots to be drawn. Ask for some with --shots"),
        ({"shots": 40}, DataError, "shots: expected at least 40 rows to draw from in rows.csv, found 30"),
        ({"shots": -1}, ConfigError, "shots: expected 0 or more"),
        ({"chat": True}, ModelError, "has no chat template"),
        (
            {"bos": "never"},
            ConfigError,
            "bos: a task of kind classification takes its opening tokens from the tokenizer",
        ),
        ({"task": task(shots={"count": 2, "draw": "first"}), "draws": 2}, ConfigError, "the same in every draw"),
        (
            {"task": task(shots={"count": 2, "draw": "first"}), "shots_seed": 7},
            ConfigError,
            "shots_seed: .* first rows",
        ),
        (
            {"task": task(shots={"rows": ROW}), "shots_seed": 7},
            ConfigError,
            "shots_seed: .* those that are written out",
        ),
        ({"shots": 0, "shots_seed": 7}, ConfigError, "shots_seed: there are no shots to be drawn"),
        ({"shots": 30}, DataError, "expected more rows than the 30 that are left out"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_sent(source, options, error, reason):
    made = model()
    with pytest.raises(error, match=reason):
        evaluate(source, made=made, **options)
    assert made.sent == []


def test_a_wrong_label_among_the_rows_that_shots_come_from_is_told_first(source, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "fine,good\n" * 20 + "fine,excellent\n")
    for how in ("fixed", "row"):
        made = model()
        own = task(shots={"count": 21 if how == "fixed" else 1, "draw": how})
        with pytest.raises(
            DataError, match=r"train\.csv, row 20 \(line 22\): the label in column label is 'excellent'"
        ):
            evaluate(source, made=made, task=own, shots_data=str(tmp_path / "train.csv"))
        assert made.sent == []


def test_a_task_of_another_class_has_no_shots(source):
    class Own:
        data = None

        def __getattr__(self, name):
            return getattr(task(), name)

    with pytest.raises(ConfigError, match="task films is of a class that has none of them"):
        evaluate(source, task=Own(), shots=2)


def test_rows_are_prepared_before_anything_reads_them(source, tmp_path):
    (tmp_path / "words.py").write_text(
        "def clean(row):\n    return {'shouted': row['text'].upper(), 'verdict': row['label']}\n"
    )
    (tmp_path / "films.yaml").write_text(
        "text: '{shouted}'\nlabel_column: verdict\nlabel_names: [bad, good]\nprepare: words:clean\nshots: 1\n"
    )
    with pytest.raises(TaskError, match="allow it with --allow-task-code"):
        evaluate(source, task=tmp_path / "films.yaml")
    run = prepared(source, task=tmp_path / "films.yaml", allow_task_code=True)
    assert len(run.part) == COUNT - 1
    longer = prepared(source, task=tmp_path / "films.yaml", allow_task_code=True, max_length=600, fail_under=["mcc=0"])
    assert texts(longer) == texts(run)
    for key, text in texts(run).items():
        assert text.startswith("FILM ")
        assert text.endswith(f"\n\nFILM {key}")
    with pytest.raises(DeadlineError):
        evaluate(source, tmp_path / "run", model(until=2), task=tmp_path / "films.yaml", allow_task_code=True)
    with (tmp_path / "words.py").open("a") as file:
        file.write("# another\n")
    with pytest.raises(RunFolderError, match=r"setting\.prepare_code: was"):
        evaluate(source, tmp_path / "run", task=tmp_path / "films.yaml", allow_task_code=True)


@pytest.mark.parametrize("how", ["fixed", "first", "row", "lm_eval"])
def test_a_row_without_an_answer_is_predicted_and_no_shot(tmp_path, how):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"film {n},{'good' if n % 3 == 1 else ''}\n" for n in range(12)))
    own = task(shots={"count": 3, "draw": how}, unlabelled="predict")
    run = prepared(DataSource(path=str(path)), task=own)
    assert "8 rows of rows.csv have no answer to show: not drawn as shots" in run.notes
    shots = [shot.index for shot in run.variants[0].task._draw.rows_for(next(iter(run.part)))]
    assert len(shots) == 3
    assert {index % 3 for index in shots} == {1}
    kept = {row.index for row in run.part}
    assert kept == set(range(12)) - (set(shots) if how in ("fixed", "first") else set())
    assert all(" is good\n\n" in text for text in texts(run).values())


def test_shots_out_of_the_tasks_own_data_set_come_from_their_split_and_not_the_evaluated_one(monkeypatch):
    read = []

    def load(source):
        read.append((source.path, source.subset, source.split))
        return rows_of([{"text": "the first", "label": "good"}])

    monkeypatch.setattr("petals_eval.evaluation.shots.load_rows", load)
    own = DataSource(path="someone/films", subset="short", split="validation")
    rows = rows_of([{"text": "film", "label": "good"}])
    for asked, split in (({}, "train"), ({"shots_split": "validation"}, "validation"), ({"shots_split": "dev"}, "dev")):
        changed = with_prompt(task(data=own), PromptSettings(shots=1, shots_data="someone/films", **asked))
        rows_and_shots(changed, rows, own, None, limit=None, seed=0, draws=1)
        assert read.pop() == ("someone/films", "short", split)


@pytest.mark.parametrize("asked", [{"shots": 2}, {"chat": True}, {"system": "Be brief."}])
def test_a_pair_of_texts_is_not_cut_to_its_first_one(asked):
    pair = task(text_pair="{other}")
    with pytest.raises(
        ConfigError, match=r"task films: text_pair: should be left out where shots, .*found '\{other\}'"
    ):
        with_prompt(pair, PromptSettings(**asked))


def test_rows_are_prepared_before_they_become_documents():
    def clean(row):
        return {"text": row["page"].strip().upper()}

    pages = PerplexityTask(name="pages", text="{text}", rows_per_document=2, separator="+", prepare="words:clean")
    rows = rows_of([{"page": " a "}, {"page": " b "}, {"page": " c "}])
    code = RowCode("words:clean", clean, None)
    found = rows_and_shots(pages, rows, None, code, limit=None, seed=0, draws=1)
    assert [row.columns for row in found.rows] == [{"text": "A+B"}, {"text": "C"}]


def test_a_row_whose_prompt_is_too_long_is_a_failure_with_the_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nshort,good\n" + "long " * 60 + ",bad\nshort,bad\n")
    own = task(shots={"rows": [{"text": "one", "label": "good"}]}, max_length=20)
    result = evaluate(DataSource(path=str(path)), tmp_path / "run", task=own)
    assert (result.first.n_scored, result.first.n_failed) == (2, 1)
    [failure] = lines_of(tmp_path / "run", "failures.jsonl")
    assert failure["key"] == "1"
    assert failure["reason"] == (
        "its prompt has 64 tokens with 1 shot, and max_length of films is 20. Ask for fewer shots, or raise "
        "max_length as far as the model reads."
    )

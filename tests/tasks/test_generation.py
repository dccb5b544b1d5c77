"""The generation task: from rows to requests, from texts to numbers, and what its definition may be."""

import math
import re

import pytest

from petals_eval.data import DataSource, load_rows
from petals_eval.data.rows import rows_of
from petals_eval.errors import DataError, PetalsEvalError, TaskError
from petals_eval.metrics import measure
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.rows import packed
from petals_eval.tasks import GenerationTask, load_task
from petals_eval.tasks.requests import Generated

GSM8K = {
    "text": "Question: {question}\nAnswer:",
    "answer": "{answer}",
    "stop": ["Question:", "</s>", "<|im_end|>"],
    "extract": {
        "strict-match": {"pattern": r"#### (\-?[0-9\.\,]+)"},
        "flexible-extract": {"pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "take": "last"},
    },
    "normalise": {"ignore_case": True, "remove": [",", r"\$", "(?s).*#### ", r"\.$"]},
    "metrics": ["exact_match", "numbers_equal"],
}


class Tokenizer:
    """A token a letter; texts begin with token 0."""

    bos_token, bos_token_id, eos_token_id = "<s>", 0, 1

    def __call__(self, texts, add_special_tokens=True, **options):
        one = isinstance(texts, str)
        ids = [[0] * add_special_tokens + [ord(letter) for letter in text] for text in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}


def task(**keys):
    return GenerationTask.model_validate({"name": "mine", "text": "{q}", **keys})


def examples(definition, rows):
    return list(definition.examples(rows_of(rows), Tokenizer()))


def values_of(definition, row, text, finish="end"):
    """The numbers of a text that was generated for a row, by their columns."""
    [example] = examples(definition, [row])
    prediction = definition.predict(example, [Generated((5, 6, 7), text, finish)])
    assert (prediction.text, prediction.finish, prediction.prediction) == (text, finish, None)
    return dict(zip(definition.columns, prediction.values[0], strict=True))


def test_a_row_is_one_request_with_the_decoding_of_the_task():
    definition = task(
        text="Q: {q}\nA:",
        answer_column="a",
        max_new_tokens=7,
        stop=["\n"],
        sampling={"temperature": 0.7, "top_p": 0.9, "seed": 4},
    )
    one, other = examples(definition, [{"q": "how?", "a": "so"}, {"q": "why?", "a": "because"}])
    [request] = one.requests
    assert request.input_ids == (0, *map(ord, "Q: how?\nA:")) and one.text == "Q: how?\nA:"
    decoding = request.decoding
    assert (decoding.max_new_tokens, decoding.stop, decoding.temperature) == (7, ("\n",), 0.7)
    assert (decoding.top_k, decoding.top_p, decoding.seed) == (0, 0.9, 4)
    assert (one.label, one.n_tokens, one.reference, other.reference) == (None, 11, ("so",), ("because",))
    assert one.row_hash != other.row_hash
    assert task().decoding.temperature == 0, "greedy unless told otherwise"


def test_any_of_several_right_texts_is_right():
    definition = task(answer_column="a", metrics=["exact_match", "token_f1"])
    row = {"q": "where?", "a": ["in Paris", "Paris"]}
    assert values_of(definition, row, " Paris ")["exact_match"] == 1.0
    assert values_of(definition, row, "Rome")["exact_match"] == 0.0
    assert values_of(definition, row, "paris!")["token_f1"] == 1.0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 2 + 2 = 4\n#### 4", 1, 1),
        (" so she has 4 eggs", 0, 1),
        (" #### 1,004.", 0, 0),
        (" first #### 4 then #### 5", 1, 0),
        (" it is $4.", 0, 1),
        (" four", 0, 0),
        ("", 0, 0),
        (" she pays 4.00", 0, 0),
    ],
)
def test_answers_are_extracted_and_compared_as_lm_eval_does_with_gsm8k(text, strict, flexible):
    row = {"question": "how many?", "answer": "She has 2+2=<<2+2=4>>4 eggs.\n#### 4"}
    found = values_of(GenerationTask(name="gsm8k", **GSM8K), row, text)
    assert (found["exact_match[strict-match]"], found["exact_match[flexible-extract]"]) == (strict, flexible)
    assert lm_eval_exact_match(text, row["answer"], r"#### (\-?[0-9\.\,]+)", 0) == strict
    assert lm_eval_exact_match(text, row["answer"], r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1) == flexible


def lm_eval_exact_match(text, answer, pattern, select):
    """What lm-evaluation-harness 0.4.13 documents of its filter `regex`, `take_first` and its exact_match."""
    found = re.findall(pattern, text)
    match = found[select] if found else "[invalid]"
    if isinstance(match, tuple):
        match = next((part for part in match if part), "[invalid]")
    match, right = match.strip(), answer
    for each in (",", r"\$", "(?s).*#### ", r"\.$"):
        match, right = re.sub(each, "", match), re.sub(each, "", right)
    return float(match.lower() == right.lower())


def test_numbers_count_whatever_they_are_written_like():
    row = {"question": "how many?", "answer": "#### 1,004"}
    definition = GenerationTask(name="mine", **{**GSM8K, "metrics": ["numbers_equal"], "extract": {}})
    assert values_of(definition, row, "5 and then $1004.00 in all")["numbers_equal"] == 1.0
    assert values_of(definition, row, "1004, no, 5")["numbers_equal"] == 0.0
    with pytest.raises(DataError, match="row 0: numbers_equal needs a number"):
        examples(definition, [{"question": "how many?", "answer": "none"}])


def test_an_answer_is_one_of_the_choices_that_stands_by_itself():
    extract = {"letter": {"choices": ["A", "B"], "take": "last"}}
    definition = task(answer_column="a", extract=extract, metrics=["exact_match"])
    row = {"q": "which?", "a": "B"}
    assert values_of(definition, row, "A, no: it is (B). BA")["exact_match[letter]"] == 1.0
    assert values_of(definition, row, "Because of A")["exact_match[letter]"] == 0.0


def test_what_was_stopped_by_its_length_is_counted_in_any_case():
    definition = task(answer_column="a")
    assert definition.metrics == ("exact_match", "stopped_by_length")
    row = {"q": "which?", "a": "B"}
    assert values_of(definition, row, "B", "length")["stopped_by_length"] == 1.0
    assert values_of(definition, row, "B", "stop")["stopped_by_length"] == 0.0
    assert values_of(definition, row, "B")["new_tokens"] == 3.0


def test_without_anything_right_texts_are_generated_and_only_counted():
    definition = task()
    assert definition.metrics == ("stopped_by_length", "new_tokens")
    [example] = examples(definition, [{"q": "go on"}])
    assert example.reference is None
    assert values_of(definition, {"q": "go on"}, "and on") == {"new_tokens": 3.0, "stopped_by_length": 0.0}


def test_rows_without_a_right_text_are_generated_and_not_compared_where_that_is_asked_for():
    rows = [{"q": "one", "a": "1"}, {"q": "two", "a": None}, {"q": "three", "a": " "}]
    definition = task(answer_column="a", metrics=["exact_match", "token_f1"])
    with pytest.raises(DataError, match=r"row 1 has no right text in column a.*--unlabelled predict"):
        examples(definition, rows)
    definition = definition.model_copy(update={"unlabelled": "predict"})
    made = examples(definition, rows)
    predictions = [definition.predict(each, [Generated((1,), "1", "end")]) for each in made]
    assert math.isnan(predictions[1].values[0][2]) and math.isnan(predictions[2].values[0][3])
    stored = ((None, None, packed(each.values)) for each in predictions)
    found = measure("generation", definition.metrics, ScoredRows.of(stored, definition.columns))
    assert found["exact_match"].value == 1.0 and "of 1 of 3 examples" in found["exact_match"].note
    assert found["stopped_by_length"].note is None
    assert examples(definition, [{"q": "no such column"}])[0].reference is None
    by_template = task(answer="{a}, {b}", unlabelled="predict")
    assert examples(by_template, [{"q": "no such columns"}])[0].reference is None


class Forgetful(Tokenizer):
    """Knows no x."""

    def __call__(self, texts, add_special_tokens=True, **options):
        known = texts.replace("x", "") if isinstance(texts, str) else [text.replace("x", "") for text in texts]
        return super().__call__(known, add_special_tokens, **options)


def test_a_text_that_makes_no_token_is_a_failure_of_its_row():
    made = list(task(bos="never").examples(rows_of([{"q": "fine"}, {"q": "x"}]), Forgetful()))
    assert made[0].error is None
    assert "no token" in str(made[1].error) and not made[1].requests


def test_a_text_too_long_for_its_new_tokens_may_lose_its_first_ones():
    definition = task(too_long="cut", max_new_tokens=4).bound_to(10)
    [short, long] = examples(definition, [{"q": "abc"}, {"q": "abcdefghij"}])
    assert not short.truncated
    assert long.truncated and long.requests[0].input_ids == tuple(map(ord, "efghij"))
    [kept] = examples(task(max_new_tokens=4).bound_to(10), [{"q": "abcdefghij"}])
    assert len(kept.requests[0].input_ids) == 11, "and else it is left to whoever knows the model's context"


def test_metrics_are_part_of_what_answers_are_for_the_journal_holds_no_texts():
    one = task(answer_column="a", metrics=["exact_match"]).fingerprint()
    assert one == task(answer_column="a", metrics=["exact_match", "new_tokens"], description="other").fingerprint()
    assert one != task(answer_column="a", metrics=["token_f1"]).fingerprint()
    for change in (
        {"stop": ["x"]},
        {"max_new_tokens": 9},
        {"sampling": {"seed": 1}},
        {"normalise": {"ignore_case": True}},
    ):
        assert one != task(answer_column="a", metrics=["exact_match"], **change).fingerprint()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"text": "no placeholder"}, "text: should hold a placeholder"),
        ({"answer": "{a}", "answer_column": "a"}, "expected one of them, found both"),
        ({"metrics": ["token_f1"]}, "metrics: token_f1 needs a right text"),
        (
            {"answer_column": "a", "metrics": ["new_tokens"], "extract": {"x": {"pattern": "a"}}},
            "extract: has no meaning",
        ),
        (
            {"answer_column": "a", "extract": {"x": {"pattern": "("}}},
            "extract.x.pattern: should be a regular expression",
        ),
        ({"answer_column": "a", "extract": {"x": {"pattern": "a", "group": 1}}}, "names a group"),
        ({"answer_column": "a", "extract": {"x": {"pattern": "a", "choices": ["b"]}}}, "either pattern or choices"),
        ({"answer_column": "a", "extract": {"x[": {"pattern": "a"}}}, "without brackets"),
        ({"answer_column": "a", "normalise": {"remove": ["("]}}, "normalise.remove: should be a regular expression"),
        ({"stop": [""]}, "stop: should hold texts, none of them empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_definition_is_told_with_its_key(keys, says):
    with pytest.raises(TaskError, match=re.escape(says)):
        task(**keys)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"a": "1"}, "has no column q"),
        ({"q": "x"}, "has no column a"),
        ({"q": " ", "a": "1"}, "is empty"),
        ({"q": "x", "a": {"b": "c"}}, "column a should hold a text or a list of texts"),
        ({"q": "x", "a": [["1"]]}, "column a should hold a text or a list of texts"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_asked_are_told_before_anything_is_sent(row, says):
    with pytest.raises(DataError, match=says):
        task(answer_column="a").check(rows_of([row]))


def test_numbers_are_the_one_text_that_was_generated():
    [example] = examples(task(), [{"q": "x"}])
    with pytest.raises(PetalsEvalError, match="expected one generated text"):
        task().predict(example, [])


def test_a_task_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "kind: generation\ntext: 'Q: {q}'\nanswer_column: a\nmax_new_tokens: 5\nstop: ['.']\nmetrics: [token_f1]\n"
        "extract:\n  word: {pattern: '\\w+'}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": ["y", "z"]}\n')
    loaded = load_task(tmp_path / "mine.yaml")
    assert (loaded.kind, loaded.head, loaded.columns[2:]) == ("generation", "lm", ("token_f1[word]",))
    rows = load_rows(DataSource(path=str(tmp_path / "rows.jsonl")))
    [example] = loaded.examples(rows, Tokenizer())
    assert example.reference == ("y", "z")
    (tmp_path / "mine.yaml").write_text("kind: generation\ntext: '{q}'\nanswer_column: a\nmetrics: [accuracy]\n")
    with pytest.raises(TaskError, match="metric of generation; found 'accuracy'"):
        load_task(tmp_path / "mine.yaml")


def test_a_shot_shows_the_first_right_text():
    turn = task(text="Q: {q}", answer_column="a").turn(next(iter(rows_of([{"q": "x", "a": ["y", "z"]}]))), "row 0")
    assert (turn.question, turn.answer, turn.delimiter) == ("Q: x", "y", " ")

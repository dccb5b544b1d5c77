"""Choice tasks: definitions, what is asked of a row, which requests that makes, and what is said of bad rows."""

import math

import pytest
import torch

from petals_eval.data import rows_of
from petals_eval.errors import DataError, NotFiniteError, PetalsEvalError, RequestTooLargeError, TaskError
from petals_eval.tasks import ChoiceTask, Task, load_task

PAIR = {"text": "{q}", "choices": ["{a}", "{b}"], "label_column": "label"}
ROW = {"q": "Lily saw a dog.", "a": "It ran.", "b": "She was happy.", "label": 1}


def task_of(**changes) -> ChoiceTask:
    values = {"name": "t", **PAIR, **changes}
    return ChoiceTask(**{key: value for key, value in values.items() if value is not None})


def lists(**changes) -> ChoiceTask:
    return task_of(**{"choices": None, "choices_column": "choices", **changes})


def contexts(**changes) -> ChoiceTask:
    values = {"text": None, "choices": None, "contexts": ["{q} {a}", "{q} {b}"], "continuation": "the end."}
    return task_of(**{**values, **changes})


def made(task, rows, tokenizer):
    return list(task.examples(rows_of(rows), tokenizer))


def refused(**changes) -> str:
    with pytest.raises(TaskError) as caught:
        task_of(**changes)
    return str(caught.value)


# -- definitions


def test_a_choice_task_is_a_task():
    task = task_of()
    assert isinstance(task, Task)
    assert (task.kind, task.head, task.label_names, task.metrics) == ("choice", "lm", (), ("acc",))
    assert task.columns == ("log_likelihood", "characters", "bytes", "tokens", "unconditioned")
    assert task.columns_read == ("q", "a", "b", "label")


def test_choices_that_are_the_same_for_every_row_are_the_label_names():
    assert task_of(choices=["True", " False "]).label_names == ("True", "False")
    assert task_of(choices=["{{x}}", "y"]).label_names == ("{x}", "y")
    assert task_of(choices=["True", "False"], label_names=["yes", "no"]).label_names == ("yes", "no")
    assert task_of(choices=["{a}", "no"]).label_names == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choices": None}, "expected one of choices, choices_column, contexts, contexts_column, found none of them"),
        ({"choices_column": "c"}, "found choices and choices_column"),
        ({"text": None}, "text: missing, and with choices it must be given"),
        ({"continuation": "x"}, "continuation: has no meaning with choices"),
        ({"choices": None, "contexts": ["{a}", "{b}"], "continuation": "x"}, "text: has no meaning with contexts"),
        ({"choices": ["{a}"]}, "choices: "),
        ({"choices": ["{a", "{b}"]}, "choices: "),
        ({"text": "{q!r}"}, "text: should hold plain placeholders"),
        ({"text": "What?", "choices": ["yes", "no"]}, "nothing is read of a row"),
        ({"choices": ["yes", "yes"]}, "choices.1: should differ from the others, found 'yes' twice"),
        ({"choices": ["yes", " "]}, "choices.1: should hold a text"),
        ({"choices": ["yes", "no"], "label_names": ["a"]}, "label_names: should be one for each of the 2 choices"),
        ({"label_names": ["a", "a "]}, "label_names: should be different from each other"),
        ({"choices": None, "choices_column": "c", "label_names": ["a", "b"]}, "label_names: have no meaning with"),
        ({"label_map": {"x": "first"}}, "label_map.x: should be the position of a choice"),
        ({"label_map": {"x": 2}}, "label_map.x: should be the position of a choice, from 0, found 2"),
        ({"choices": ["yes", "no"], "label_map": {"x": "maybe"}}, "label_map.x: should be one of the label names"),
        ({"too_long": "drop"}, "too_long: should be 'fail' or 'cut'"),
        ({"choises": ["a"]}, "choises: unknown key. Did you mean choices?"),
    ],
)
def test_a_wrong_definition(changes, said):
    assert said in refused(**changes)


def test_mutual_information_needs_an_answer_that_differs():
    assert task_of(metrics=["acc", "acc_mutual_info"]).asks_without_context
    with pytest.raises(TaskError, match=r"metrics: acc_mutual_info .* acc is that number"):
        contexts(metrics=["acc_mutual_info"])


def test_from_a_file(tmp_path):
    path = tmp_path / "copa.yaml"
    path.write_text(
        "kind: choice\ntext: '{premise}'\nchoices: ['{choice1}', '{choice2}']\nlabel_column: label\n"
        "label_map: {no: 0, yes: 1}\nmetrics: [acc, acc_norm]\nmax_length: 40\ndelimiter: ''\n"
    )
    task = load_task(path)
    assert isinstance(task, ChoiceTask)
    assert (task.name, task.max_length, task.delimiter, task.label_map) == ("copa", 40, "", {"no": "0", "yes": "1"})
    path.write_text(path.read_text().replace("acc_norm", "accuracy"))
    with pytest.raises(TaskError, match="accuracy needs choices that all rows share: give the task label_names"):
        load_task(path)
    path.write_text("kind: choice\ntext: ''\ncontexts: ['{a}', '{b}']\ncontinuation: x\nlabel_column: label\n")
    with pytest.raises(TaskError, match="text: has no meaning with contexts"):
        load_task(path)
    path.write_text(
        "kind: choice\ncontexts: ['{a}', '{b}']\ncontinuation: x\nlabel_column: label\nlabel_map: {1: 0, 2: 1}\n"
    )
    task = load_task(path)
    assert isinstance(task, ChoiceTask) and task.columns_read == ("a", "b", "label")


def test_the_fingerprint_is_what_changes_an_answer():
    same = task_of().fingerprint()
    assert task_of(metrics=["acc", "acc_norm"], description="x", unlabelled="predict").fingerprint() == same
    for change in ({"delimiter": ""}, {"bos": "never"}, {"metrics": ["acc_mutual_info"]}, {"too_long": "cut"}):
        assert task_of(**change).fingerprint() != same


# -- what is asked of a row


def test_the_texts_of_a_row(tokenizer):
    rows = rows_of([ROW])
    [row] = rows
    assert task_of().pairs(rows, row, tokenizer) == [(ROW["q"], " It ran."), (ROW["q"], " She was happy.")]
    assert task_of(delimiter="\n").pairs(rows, row, tokenizer)[0] == (ROW["q"], "\nIt ran.")
    assert contexts().pairs(rows, row, tokenizer) == [
        ("Lily saw a dog. It ran.", " the end."),
        ("Lily saw a dog. She was happy.", " the end."),
    ]
    both = task_of(metrics=["acc", "acc_mutual_info"]).pairs(rows, row, tokenizer)
    assert both[2:] == [("", " It ran."), ("", " She was happy.")]


def test_a_row_as_a_shot():
    [row] = rows_of([ROW])
    turn = task_of().turn(row, "shots, row 0")
    assert (turn.question, turn.answer, turn.delimiter) == (ROW["q"], "She was happy.", " ")
    turn = contexts().turn(row, "shots, row 0")
    assert (turn.question, turn.answer) == ("Lily saw a dog. She was happy.", "the end.")
    with pytest.raises(DataError, match=r"^shots, row 0: the label"):
        task_of(label_column="q").turn(row, "shots, row 0")


def test_as_many_choices_as_each_row_likes(tokenizer):
    rows = [
        {"q": "Lily saw", "choices": ["a dog", "a cat"], "label": 0},
        {"q": "Tom", "choices": list("xyz"), "label": 2},
    ]
    found = made(lists(), rows, tokenizer)
    assert [len(example.reference.places) for example in found] == [2, 3]
    assert [example.label for example in found] == [0, 2]
    assert found[0].text == "Lily saw[ a dog| a cat]"


@pytest.mark.parametrize(
    ("label", "label_map", "expected"),
    [
        (1, {}, 1),
        (1.0, {}, 1),
        ("1", {}, 1),
        ("She was happy.", {}, 1),
        (" It ran. ", {}, 0),
        ("B", {"A": 0, "B": 1}, 1),
        ("2", {"1": 0, "2": 1}, 1),
        (2, {"1": 0, "2": 1}, 1),
        (True, {"false": 0, "true": 1}, 1),
    ],
)
def test_labels_of_choices_without_names(tokenizer, label, label_map, expected):
    [found] = made(task_of(label_map=label_map), [{**ROW, "label": label}], tokenizer)
    assert found.label == expected


@pytest.mark.parametrize(
    ("label", "label_map", "said"),
    [
        (2, {}, "the label in column label is 2. Expected a position from 0 to 1, or the text of one of the choices"),
        ("C", {"A": 0, "B": 1}, "or a key of label_map: 'A', 'B'"),
        (0, {"1": 0, "2": 1}, "the label in column label is 0. Expected the text of one"),
        ("it ran.", {}, "is 'it ran.'. Expected"),
        (True, {}, "is True. Expected"),
        (None, {}, "is None. Expected"),
        (-1, {}, "To predict such rows all the same, in no metric: --unlabelled predict."),
    ],
)
def test_labels_that_say_nothing(label, label_map, said):
    with pytest.raises(DataError) as caught:
        task_of(label_map=label_map).check(rows_of([{**ROW, "label": label}]))
    assert str(caught.value).startswith("data, row 0: ") and said in str(caught.value)


def test_a_text_that_is_one_choice_and_the_position_of_another_is_not_guessed():
    row = {"q": "1 + 0 =", "a": "1", "b": "0", "label": "1"}
    with pytest.raises(DataError, match=r"the text of choice 0, and as a number it is the position of another"):
        task_of().check(rows_of([row]))
    task_of(label_map={"0": 0, "1": 1}).check(rows_of([row]))
    task_of().check(rows_of([{**row, "label": 1}]))  # a number, and no text


def test_names_of_classes_are_keys_or_positions(tokenizer):
    import datasets

    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["A", "B", "C"]),
        }
    )
    table = datasets.Dataset.from_list([{"q": "1 + 1", "choices": ["3", "2", "1"], "label": 1}], features=features)
    assert made(lists(), table, tokenizer)[0].label == 1
    assert made(lists(label_map={"A": 2, "B": 0, "C": 1}), table, tokenizer)[0].label == 0


def test_rows_without_a_label_are_predicted_where_that_is_asked_for(tokenizer):
    task = task_of(unlabelled="predict")
    assert made(task, [{**ROW, "label": -1}], tokenizer)[0].label is None
    hidden = {key: value for key, value in ROW.items() if key != "label"}
    assert made(task, [hidden], tokenizer)[0].label is None  # a hidden test set may have no such column
    with pytest.raises(DataError, match="the label in column label is 7"):
        made(task, [{**ROW, "label": 7}], tokenizer)


# -- rows that cannot be asked


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (task_of(), {**ROW, "b": "  "}, "row 1 is empty: no text in b"),
        (task_of(), {**ROW, "a": None}, "row 1 has no text in column a"),
        (lists(), {"q": "x", "choices": ["one"], "label": 0}, "row 1: expected two choices or more, found 1"),
        (lists(), {"q": "x", "choices": ["one", ""], "label": 0}, "row 1, choice 1 is empty"),
        (lists(), {"q": "x", "choices": ["one", None], "label": 0}, "row 1, choice 1 has no text"),
        (contexts(continuation="{a}"), {**ROW, "a": ""}, "row 1 is empty"),
    ],
)
def test_bad_rows_are_told_before_anything_is_sent(tokenizer, task, row, said):
    good = {"q": "x", "choices": ["one", "two"], "label": 0} if "choices" in row else ROW
    with pytest.raises(DataError) as caught:
        next(task.examples(rows_of([good, row]), tokenizer))
    assert said in str(caught.value)


def test_a_column_that_holds_no_list():
    with pytest.raises(
        DataError, match=r"row 0: column choices should hold a list of texts.*found 'one\|two'.*use jsonl"
    ):
        lists().check(rows_of([{"q": "x", "choices": "one|two", "label": 0}]))


def test_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"data has no column choices, which task t reads.*Did you mean choice\?"):
        lists().check(rows_of([{"q": "x", "choice": ["a", "b"], "label": 0}]))


def test_a_copy_of_the_right_choice_makes_a_row_a_failure_and_a_copy_of_a_wrong_one_does_not(tokenizer):
    rows = [{"q": "Tom ran.", "choices": ["yes", "no", "no"], "label": label} for label in (0, 2)]
    wrong, right = made(lists(), rows, tokenizer)
    assert wrong.error is None and len(wrong.reference.places) == 3
    assert right.requests == () and "the right choice, 'no', is there 2 times" in str(right.error)
    assert right.label == 2 and right.row_hash


def test_what_only_the_tokenizer_shows_is_an_error_of_the_row(tokenizer):
    rows = [{"q": "I see th", "a": "e", "b": "at", "label": 0}, {**ROW, "label": 0}]
    merged, good = made(task_of(delimiter=""), rows, tokenizer)
    assert "the answer 'e' begins inside a token" in str(merged.error) and merged.requests == ()
    assert good.error is None


# -- requests


def test_choices_of_one_token_are_one_request(tokenizer):
    [example] = made(task_of(choices=["a", "the"]), [{"q": "Tom saw", "label": "a"}], tokenizer)
    [request] = example.requests
    context = tokenizer.encode("Tom saw")
    words = [tokenizer.encode(f"Tom saw {word}")[-1] for word in ("a", "the")]
    assert list(request.input_ids) == context
    assert request.targets == tuple((len(context) - 1, word) for word in words)
    assert not request.asks_greedy
    assert example.n_tokens == len(context)


def test_a_choice_that_begins_another_is_read_there(tokenizer):
    """' a' stands in ' a dog', whose likelihoods a causal model computes on the way."""
    task = task_of(choices=["a", "the cat", "a dog"])
    [example] = made(task, [{"q": "Tom saw", "label": "a"}], tokenizer)
    assert [place.part for place in example.reference.places] == [0, 1, 0]
    for place, choice in zip(example.reference.places, task.choices, strict=True):
        request = example.requests[place.part]
        whole = tokenizer.encode(f"Tom saw {choice}")
        context = len(tokenizer.encode("Tom saw"))
        targets = request.targets[place.start : place.stop]
        assert [token for _, token in targets] == whole[context:]
        for position, token in targets:
            assert list(request.input_ids[: position + 1]) == whole[: position + 1] and whole[position + 1] == token


def test_longer_choices_are_a_request_each_without_the_last_token(tokenizer):
    [example] = made(task_of(), [ROW], tokenizer)
    assert [list(request.input_ids) for request in example.requests] == [
        tokenizer.encode(f"{ROW['q']} {choice}")[:-1] for choice in (ROW["a"], ROW["b"])
    ]
    assert [place.tokens for place in example.reference.places] == [len(each.targets) for each in example.requests]
    assert example.reference.counted == ((7, 7), (14, 14))
    [example] = made(task_of(), [{**ROW, "a": "Ça."}], tokenizer)
    assert example.reference.counted[0] == (3, 4)


def test_without_context_is_asked_only_for_mutual_information(tokenizer):
    [example] = made(task_of(metrics=["acc", "acc_mutual_info"]), [ROW], tokenizer)
    assert len(example.requests) == 4
    for request, choice in zip(example.requests[2:], (ROW["a"], ROW["b"]), strict=True):
        whole = [tokenizer.bos_token_id, *tokenizer.encode(f" {choice}", add_special_tokens=False)]
        assert list(request.input_ids) == whole[:-1]
        assert [token for _, token in request.targets] == whole[1:]


@pytest.mark.parametrize("limit", ["max_length", "the model"])
def test_a_row_that_is_too_long_fails_or_loses_its_first_tokens(tokenizer, limit):
    row = {**ROW, "q": "once upon a time " * 10 + "Lily saw a dog.", "b": "She was happy and it ran."}
    wholes = [tokenizer.encode(f"{row['q']} {choice}") for choice in (row["a"], row["b"])]
    longest = len(wholes[0]) - 1
    assert len(wholes[1]) > len(wholes[0])

    def example(room, **changes):
        changes |= {"max_length": room} if limit == "max_length" else {}
        task = task_of(**changes)
        [found] = made(task if limit == "max_length" else task.bound_to(room), [row], tokenizer)
        return found

    assert example(len(wholes[1]) - 1).error is None
    failed = example(longest)
    assert isinstance(failed.error, RequestTooLargeError)
    assert f"expected {longest} at most" in str(failed.error) and "too_long: cut" in str(failed.error)

    cut = example(longest, too_long="cut")
    assert cut.truncated and [len(request.input_ids) for request in cut.requests] == [longest, longest]
    assert list(cut.requests[0].input_ids) == wholes[0][:-1]
    assert list(cut.requests[1].input_ids) == wholes[1][:-1][-longest:]
    positions = [position for position, _ in cut.requests[1].targets]
    assert positions == list(range(longest - len(positions), longest))
    alone = example(3, too_long="cut")
    assert "expected 3 at most" in str(alone.error) and alone.requests == ()


# -- predictions


def test_the_likeliest_choice_and_its_values(tokenizer):
    task = task_of(metrics=["acc", "acc_mutual_info"])
    [example] = made(task, [ROW], tokenizer)
    answers = [torch.full((len(request.targets),), -1.0 - request.part) for request in example.requests]
    found = task.predict(example, answers)
    first, second = (len(request.targets) for request in example.requests[:2])
    assert found.prediction == (0 if first <= 2 * second else 1)
    assert found.values == (
        (-1.0 * first, 7, 7, first, -3.0 * len(answers[2])),
        (-2.0 * second, 14, 14, second, -4.0 * len(answers[3])),
    )
    assert (found.label, found.n_requests, found.row_hash) == (1, 4, example.row_hash)


def test_the_first_of_equals_is_chosen_and_what_was_not_asked_is_not_a_number(tokenizer):
    task = task_of(choices=["a", "the"])
    [example] = made(task, [{"q": "Tom saw", "label": "the"}], tokenizer)
    found = task.predict(example, [torch.tensor([-2.0, -2.0])])
    assert found.prediction == 0
    assert all(math.isnan(item[-1]) for item in found.values)


def test_answers_that_are_not_finite_or_not_enough(tokenizer):
    task = task_of(choices=["a", "the"])
    [example] = made(task, [{"q": "Tom saw", "label": "the"}], tokenizer)
    with pytest.raises(NotFiniteError, match="expected finite likelihoods"):
        task.predict(example, [torch.tensor([-2.0, float("nan")])])
    with pytest.raises(PetalsEvalError, match="expected 1 answers, found 0"):
        task.predict(example, [])

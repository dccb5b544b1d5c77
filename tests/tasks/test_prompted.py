"""What stands around a question, character for character: instruction, shots, and the tokenizer's chat template."""

import copy
from typing import ClassVar

import pytest

from petals_eval.data import rows_of
from petals_eval.errors import DataError, ExampleError, ModelError, TaskError
from petals_eval.tasks import ChoiceTask, ClassificationTask, ContinuationTask, GenerationTask
from petals_eval.tasks.prompted import PromptedTask
from petals_eval.tasks.shots import Shots, draw_shots

ROWS = [
    {"question": "Is it day?", "answer": "1"},
    {"question": "Is it night?", "answer": "0"},
    {"question": "Is it cold?", "answer": "0"},
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def choice(**changes):
    values = {"text": "Q: {question}\nA:", "choices": ["no", "yes"], "label_column": "answer"}
    return ChoiceTask(**{"name": "t", **values, **changes})


def words(**changes):
    values = {"text": "{question} ->", "label_column": "answer", "label_names": ["no", "yes"], "max_length": 500}
    return ClassificationTask(**{"name": "t", "label_words": [" no", " yes"], **values, **changes})


def shown(task):
    """The task with the first two rows as its shots."""
    rows = rows_of(ROWS)
    return task.showing(draw_shots(Shots(count=2, draw="first"), rows, rows, seed=0, is_shared=False))


def third(task, tokenizer, row=2):
    rows = rows_of(ROWS)
    return list(task.examples(rows, tokenizer))[row]


@pytest.fixture
def chatting(tokenizer):
    """The tokenizer with a chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = CHAT
    return changed


def test_without_anything_around_it_the_question_is_the_text(tokenizer):
    assert choice().contexts(["a", "b"], next(iter(rows_of(ROWS))), tokenizer) == ["a", "b"]
    assert third(choice(), tokenizer).text == "Q: Is it cold?\nA:[ no| yes]"


def test_shots_stand_before_the_question_with_their_answers(tokenizer):
    task = shown(choice(shots=2))
    assert third(task, tokenizer).text == (
        "Q: Is it day?\nA: yes\n\nQ: Is it night?\nA: no\n\nQ: Is it cold?\nA:[ no| yes]"
    )


def test_an_instruction_and_another_separator(tokenizer):
    task = shown(choice(shots={"count": 2}, instruction="Answer these.\n", separator="\n###\n", delimiter="\t"))
    assert third(task, tokenizer).text == (
        "Answer these.\nQ: Is it day?\nA:\tyes\n###\nQ: Is it night?\nA:\tno\n###\nQ: Is it cold?\nA:[\tno|\tyes]"
    )


@pytest.mark.parametrize(
    ("system", "instruction", "front"),
    [
        ("Be good.", "", "Be good."),
        ("Be good.", "Answer.", "Be good.\n\nAnswer."),
        ("Be good.\n", "Answer.", "Be good.\nAnswer."),
        ("Be good.", " Answer.", "Be good. Answer."),
    ],
)
def test_a_system_message_without_a_chat_stands_in_front(tokenizer, system, instruction, front):
    task = choice(system=system, instruction=instruction)
    assert third(task, tokenizer).text == f"{front}Q: Is it cold?\nA:[ no| yes]"


def test_contexts_that_differ_stand_after_the_same_shots(tokenizer):
    """WinoGrande's form: a shot is the right context, and what follows it."""
    values = {
        "contexts": ["At night {question}", "By day {question}"],
        "continuation": "I ask.",
        "label_column": "answer",
    }
    task = shown(ChoiceTask(name="t", shots=2, **values))
    shots = "By day Is it day? I ask.\n\nAt night Is it night? I ask.\n\n"
    assert third(task, tokenizer).text == (f"{shots}At night Is it cold?[ I ask.]\n{shots}By day Is it cold?[ I ask.]")


def test_a_chat_has_the_shots_as_turns_and_no_delimiters(chatting):
    task = shown(choice(shots=2, chat=True, system="Be good.", instruction="Answer."))
    made = third(task, chatting)
    assert made.text == (
        "<s><system>Be good.\n\nAnswer.</system><user>Q: Is it day?\nA:</user><assistant>yes</assistant>"
        "<user>Q: Is it night?\nA:</user><assistant>no</assistant><user>Q: Is it cold?\nA:</user><assistant>[no|yes]"
    )
    [request, *_] = made.requests
    assert request.input_ids[0] == chatting.bos_token_id
    assert request.input_ids.count(chatting.bos_token_id) == 1


def test_every_kind_that_goes_on_from_a_text_has_shots(chatting):
    """A continuation shows its targets, a generation the first of its right texts."""
    target = ContinuationTask(name="t", text="Q: {question}\nA:", target="{answer}", shots=2)
    written = GenerationTask(name="t", text="Q: {question}\nA:", answer="{answer}", max_new_tokens=5, shots=2)
    shots = "Q: Is it day?\nA: 1\n\nQ: Is it night?\nA: 0\n\n"
    assert third(shown(target), chatting).text == f"{shots}Q: Is it cold?\nA:[ 0]"
    assert third(shown(written), chatting).text == f"{shots}Q: Is it cold?\nA:"
    in_a_chat = "<s><user>Q: Is it cold?\nA:</user><assistant>"
    for task in (target, written):
        made = third(task.model_copy(update={"chat": True, "shots": None}), chatting)
        assert made.text.removesuffix("[0]") == in_a_chat
        assert made.requests[0].input_ids.count(chatting.bos_token_id) == 1


def test_a_chat_template_that_fails_for_every_row_is_told_at_once(chatting):
    chatting.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}x"
    )
    choice(chat=True).check_chat(chatting)
    with pytest.raises(ModelError, match=r"no system, please \(the roles were system, user\)\. It may take no system"):
        choice(chat=True, system="Be good.").check_chat(chatting)
    chatting.chat_template = "{{ nothing.of.that }}"
    with pytest.raises(ModelError, match="chat template of this model's tokenizer fails: 'nothing' is undefined"):
        choice(chat=True).check_chat(chatting)


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(ModelError, match=r"this model's tokenizer has no chat template\. Leave chat out"):
        choice(chat=True).check_chat(tokenizer)


@pytest.mark.parametrize("kind", [choice, words])
def test_a_chat_template_that_fails_for_one_row_fails_that_row(chatting, kind):
    chatting.chat_template = CHAT + "{% if 'night' in messages[-1].content %}{{ raise_exception('dark') }}{% endif %}"
    made = list(kind(chat=True).examples(rows_of(ROWS), chatting))
    assert [each.error is None for each in made] == [True, False, True]
    assert made[1].requests == ()
    assert isinstance(made[1].error, ExampleError)
    assert "dark" in str(made[1].error)


def test_label_words_after_shots(tokenizer):
    """A word follows its text as it is written; what is asked for is the word after the whole prompt."""
    text = "Now:\nIs it day? -> yes\n\nIs it night? -> no\n\nIs it cold? ->"
    made = third(shown(words(shots=2, instruction="Now:\n")), tokenizer)
    assert made.text == text
    whole = tokenizer(text)["input_ids"]
    for request, word in zip(made.requests, (" no", " yes"), strict=True):
        assert [*request.input_ids, request.targets[-1][1]] == tokenizer(text + word)["input_ids"]
        assert request.targets[0][0] == len(whole) - 1


def test_label_words_in_a_chat_stand_after_one_beginning_of_text(chatting):
    made = third(words(chat=True, label_words=["no", "yes"]), chatting)
    assert made.text == "<s><user>Is it cold? -></user><assistant>"
    assert all(request.input_ids.count(chatting.bos_token_id) == 1 for request in made.requests)
    assert chatting.decode(made.requests[0].input_ids).startswith("<s>")


def test_a_trained_head_reads_shots_with_label_names(tokenizer, chatting):
    made = third(shown(words(label_words=None, shots=2)), tokenizer)
    text = "Is it day? -> yes\n\nIs it night? -> no\n\nIs it cold? ->"
    assert made.text == text
    [request] = made.requests
    assert request.targets == ()
    assert list(request.input_ids) == tokenizer(text)["input_ids"]
    [request] = third(words(label_words=None, chat=True), chatting).requests
    assert request.input_ids.count(chatting.bos_token_id) == 1


@pytest.mark.parametrize("labels", [None, (" no", " yes")])
def test_a_prompt_that_is_too_long_fails_whole(tokenizer, labels):
    made = third(shown(words(label_words=labels, shots=2, max_length=20)), tokenizer)
    assert made.requests == ()
    assert not made.truncated
    assert "tokens with 2 shots, and max_length of t is 20. Ask for fewer shots, or raise max_length" in str(made.error)


def test_a_choice_whose_prompt_is_too_long_for_the_model_fails_whole(tokenizer):
    made = third(shown(choice(shots=2)).bound_to(20), tokenizer)
    assert made.requests == ()
    assert "expected 20 at most" in str(made.error)


def test_shots_that_nobody_drew(tokenizer):
    with pytest.raises(TaskError, match=r"its shots have not been drawn\. petals_eval\.evaluate draws them"):
        third(choice(shots=2), tokenizer)


def test_a_shot_without_an_answer_and_one_without_a_column(tokenizer):
    task = choice(shots=1, unlabelled="predict")
    for rows, reason in (
        ([{"question": "Is it?", "answer": ""}], r"a shot, data, row 0 has no answer to show"),
        ([{"text": "Is it?", "answer": "0"}], r"a shot, data, row 0 has no column 'question'.*found: text, answer"),
    ):
        pool = rows_of(rows)
        drawn = draw_shots(Shots(count=1), pool, pool, seed=0, is_shared=False)
        with pytest.raises(DataError, match=reason):
            third(task.showing(drawn), tokenizer)


def test_classes_that_the_pool_names_decide_its_labels():
    """As they do for the rows that are evaluated."""
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["yes", "no"])}
    )
    pool = rows_of(datasets.Dataset.from_list([{"question": "Is it day?", "answer": 0}], features=features))
    for task in (choice(), words()):
        assert task.drawing_from(pool).shown_turn(next(iter(pool))).answer.strip() == "yes"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shots": "many"}, "shots: should be keys and values"),
        ({"shots": {"count": 2, "drawn": "row"}}, r"shots\.drawn: unknown key\. Did you mean draw\?"),
        ({"shots": {"split": "train"}}, "should have a count"),
        ({"prepare": "clean"}, "prepare: "),
        ({"chat": "sometimes"}, "chat: "),
    ],
)
def test_definitions_that_mean_nothing(changes, reason):
    for kind in (choice, words):
        with pytest.raises(TaskError, match=reason):
            kind(**changes)


def test_shots_are_balanced_by_labels_that_rows_share():
    choice(shots={"count": 2, "balanced": True})
    with pytest.raises(TaskError, match=r"shots\.balanced: needs labels that all rows share"):
        ChoiceTask(name="t", text="{q}", choices_column="c", label_column="l", shots={"count": 2, "balanced": True})


def test_a_kind_that_takes_no_shots_says_why():
    class Whole(PromptedTask):
        kind: str = "whole"
        without_shots = "scores whole documents"
        columns_read: ClassVar = ("text",)

        def check_row(self, rows, row):
            pass

    Whole(name="w", metrics=("m",))
    with pytest.raises(TaskError, match=r"shots: a task of kind whole scores whole documents\. Leave shots out"):
        Whole(name="w", metrics=("m",), shots=2)
    with pytest.raises(TaskError, match="chat: a task of kind whole scores whole documents"):
        Whole(name="w", metrics=("m",), chat=True)
    with pytest.raises(TaskError, match="system: a task of kind whole"):
        Whole(name="w", metrics=("m",), system="x")


@pytest.mark.parametrize("kind", [choice, words])
def test_the_fingerprint_tells_what_stands_around(kind):
    plain = kind().fingerprint()
    assert not {"shots", "chat", "instruction", "system", "separator", "prepare"} & plain.keys()
    changes = [{"shots": 2}, {"shots": 3}, {"chat": True}, {"instruction": "x"}, {"system": "x"}, {"prepare": "a:b"}]
    changes += [{"shots": 2, "separator": "\n"}]
    changes += [{"system": "x", "instruction": "y", **more} for more in ({}, {"separator": "\n"}, {"separator": ""})]
    one_text = [{"system": "x", "instruction": " y", **more} for more in ({}, {"separator": "\n"})]
    assert kind(**one_text[0]).fingerprint() == kind(**one_text[1]).fingerprint()  # nothing stands between them
    every = [plain, *(kind(**each).fingerprint() for each in changes)]
    assert all(one != other for at, one in enumerate(every) for other in every[:at])

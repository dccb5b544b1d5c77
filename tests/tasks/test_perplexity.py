"""Perplexity: the definition of a task, the documents it makes of rows, and what it makes of answers."""

import math

import numpy as np
import pytest
import torch

from petals_eval.data import DataSource, load_rows, rows_of
from petals_eval.errors import DataError, ModelError, NotFiniteError, PetalsEvalError, TaskError
from petals_eval.tasks import PerplexityTask, Task, load_task


def task_of(**changes) -> PerplexityTask:
    return PerplexityTask(**{"name": "t", "text": "{text}", **changes})


def made(task, records, tokenizer):
    rows = task.documents(rows_of([{"text": record} if isinstance(record, str) else record for record in records]))
    return list(task.examples(rows, tokenizer))


def whole(example) -> list[int]:
    """The tokens of a document and what stands before them, from its windows."""
    first, *further = example.requests
    tokens = [*first.input_ids, first.targets[-1][1]]
    for window in further:
        tokens += [token for _, token in window.targets]
    return tokens


@pytest.mark.parametrize(("bos", "own"), [("auto", [1]), ("always", [1]), ("never", [])])
def test_the_start_token_stands_before_whatever_the_tokenizer_makes_of_a_document(tokenizer, bos, own):
    text = "Once upon a time there was a dog."
    [example] = made(task_of(bos=bos), [text], tokenizer)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole(example) == [tokenizer.bos_token_id, *own, *plain]
    assert (example.label, example.text, example.truncated) == (None, text, False)


def test_a_text_that_spells_its_start_gets_no_other(tokenizer):
    [example] = made(task_of(), ["<s>Once upon a time"], tokenizer)
    assert whole(example)[:3].count(1) == 2


def test_windows_are_as_long_as_the_model_reads(tokenizer):
    text = "Once upon a time there was a dog. " * 40
    count = 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for task, longest in (
        (task_of().bound_to(100), 100),
        (task_of(max_length=64).bound_to(100), 64),
        (task_of(max_length=64), 64),
        (task_of().bound_to(None), 2048),
        (task_of(), 2048),
    ):
        [example] = made(task, [text], tokenizer)
        assert max(len(request.input_ids) for request in example.requests) == min(longest, count)
        assert sum(len(request.targets) for request in example.requests) == count
        assert example.n_tokens == sum(len(request.input_ids) for request in example.requests)
        assert task.fingerprint()["max_length"] == longest


@pytest.mark.parametrize(
    ("changes", "context", "expected"),
    [
        ({"max_length": 101}, 100, "max_length: should be at most 100, the tokens that this model reads beside its "),
        ({"context": 101}, 100, "context: should be at most 100, the tokens of a window of this model, found 101"),
        ({"context": 4000}, None, "context: should be at most 2048"),
    ],
)
def test_windows_that_this_model_cannot_read(changes, context, expected):
    with pytest.raises(TaskError, match=expected):
        task_of(**changes).bound_to(context)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context": 9, "max_length": 8}, "context: should be at most max_length (8), found 9"),
        ({"context": 0}, "context: should be greater than or equal to 1, found 0"),
        ({"rows_per_document": 0}, "rows_per_document: should be a whole number of 1 or more, or all, found 0"),
        (
            {"rows_per_document": "each"},
            "rows_per_document: should be a whole number of 1 or more, or all, found 'each'",
        ),
        ({"rows_per_document": True}, "rows_per_document: should be a whole number of 1 or more, or all, found True"),
        ({"text": "text"}, "text: should hold a placeholder for each column"),
        ({"counted": "{"}, "counted: "),
        ({"windows": 3}, "windows: unknown key."),
        ({"bos": "twice"}, "bos: should be 'auto', 'always' or 'never'"),
        ({"data": {"path": ""}}, "this task's data: this data source cannot be used:\n  path: "),
    ],
)
def test_a_wrong_definition(changes, expected):
    with pytest.raises(TaskError) as caught:
        task_of(**changes)
    assert expected in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_task_file(tmp_path):
    (tmp_path / "stories.yaml").write_text(
        'kind: perplexity\ntext: "{text}"\nrows_per_document: all\nseparator: "\\n"\ncontext: 8\nmax_length: null\n'
        "metrics: [word_perplexity]\n"
    )
    task = load_task(tmp_path / "stories.yaml")
    assert isinstance(task, PerplexityTask) and isinstance(task, Task)
    assert (task.name, task.rows_per_document, task.separator, task.context) == ("stories", "all", "\n", 8)
    (tmp_path / "pages.yaml").write_text('kind: perplexity\ntext: "{text}"\nrows_per_document: 12\nmax_length: 64\n')
    task = load_task(tmp_path / "pages.yaml")
    assert isinstance(task, PerplexityTask)
    assert (task.rows_per_document, task.max_length, task.counted) == (12, 64, None)
    (tmp_path / "wrong.yaml").write_text('kind: perplexity\ntext: "{text}"\nmetrics: [accuracy]\n')
    with pytest.raises(TaskError, match=r"wrong\.yaml: metrics: Expected the name of a metric of perplexity"):
        load_task(tmp_path / "wrong.yaml")


def test_what_changes_an_answer_is_in_the_fingerprint():
    base = task_of()
    changes = {
        "text": "{other}",
        "counted": "{other}",
        "rows_per_document": 3,
        "separator": " ",
        "context": 2,
        "max_length": 7,
        "bos": "never",
    }
    prints = [base.fingerprint(), base.bound_to(30).fingerprint()]
    prints += [task_of(**{key: value}).fingerprint() for key, value in changes.items()]
    assert all(one != other for at, one in enumerate(prints) for other in prints[at + 1 :])
    assert task_of(name="u", metrics=["bits_per_byte"], description="d").fingerprint() == base.fingerprint()


def test_words_and_bytes_are_those_of_the_counted_text(tokenizer):
    record = {"text": "a dog", "page": "a  dög !\n"}
    for counted, words, size in ((None, 2, 5), ("{page}", 4, 10)):
        [example] = made(task_of(counted=counted), [record], tokenizer)
        answers = [torch.full((len(example.requests[0].targets),), -1.0)]
        found = task_of(counted=counted).predict(example, answers)
        # A blank at the end is followed by an empty word, as lm-evaluation-harness counts.
        assert found.values == ((-float(len(answers[0])), len(answers[0]), words, size),)


def test_documents_of_several_rows(tokenizer):
    task = task_of(rows_per_document=2, separator="\n")
    examples = made(task, ["One.", "Two.", "Three."], tokenizer)
    assert [(example.key, example.text) for example in examples] == [("0", "One.\nTwo."), ("1", "Three.")]
    [alone, _] = made(task, ["One.", "Two.", "Other."], tokenizer)
    assert alone.row_hash == examples[0].row_hash != examples[1].row_hash
    assert task.columns == ("log_likelihood", "tokens", "words", "bytes")


def test_texts_are_tokenised_alone_whatever_else_is_in_a_chunk(tokenizer, monkeypatch):
    texts = [f"{number} dogs went to the park. " * (1 + number % 5) for number in range(30)]
    together = made(task_of(), texts, tokenizer)
    monkeypatch.setattr("petals_eval.tasks.perplexity._CHUNK_CHARACTERS", 100)
    assert [whole(example) for example in made(task_of(), texts, tokenizer)] == [whole(each) for each in together]


def test_likelihoods_add_up_in_float64(tokenizer):
    """Ten thousand numbers whose sum in float32 would be off in the fourth digit."""
    [example] = made(task_of(max_length=50), ["dog " * 12000], tokenizer)
    random = np.random.default_rng(0)
    answers = [
        torch.tensor(random.uniform(-9, 0, len(request.targets)), dtype=torch.float32) for request in example.requests
    ]
    found = task_of().predict(example, answers)
    exact = math.fsum(value for answer in answers for value in answer.tolist())
    assert found.prediction is None and found.label is None
    assert found.n_requests == len(example.requests)
    assert found.values[0][0] == pytest.approx(exact, rel=1e-14)
    assert found.values[0][1] == sum(len(answer) for answer in answers)


def test_answers_that_cannot_be_used(tokenizer):
    [example] = made(task_of(), ["a dog"], tokenizer)
    count = len(example.requests[0].targets)
    with pytest.raises(NotFiniteError, match="document 0: expected a finite log-likelihood, found -inf"):
        task_of().predict(example, [torch.full((count,), -torch.inf)])
    with pytest.raises(PetalsEvalError, match="expected 1 answers, found 2"):
        task_of().predict(example, [torch.zeros(count)] * 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text": "{texts}"}, "lines.txt has no column texts, which task t reads. .*Did you mean text?"),
        ({"counted": "{page}"}, "lines.txt has no column page"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, changes, expected):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n")
    with pytest.raises(DataError, match=expected):
        task_of(**changes).check(load_rows(DataSource(path=str(tmp_path / "lines.txt"))))


def test_a_document_without_text_is_named():
    rows = rows_of([{"text": "One."}, {"text": ""}, {"text": " "}, {"text": ""}])
    with pytest.raises(DataError, match="data, row 1 is empty: no text in text"):
        task_of().check(rows)
    pairs = task_of(rows_per_document=2)
    with pytest.raises(DataError, match="data, document 1 is empty: no text in text"):
        pairs.check(pairs.documents(rows))
    all_in_one = task_of(rows_per_document="all")
    documents = all_in_one.documents(rows)
    all_in_one.check(documents)
    assert len(documents) == 1


def test_rows_that_passed_are_not_looked_at_again():
    rows = rows_of([{"text": "One."}])
    task_of().check(rows)
    assert len(rows.passed) == 1
    task_of(context=3).check(rows)
    assert len(rows.passed) == 1


def test_a_text_without_tokens(tokenizer):
    class Nothing:
        bos_token, bos_token_id, eos_token_id = None, None, 2

        def __call__(self, texts, **options):
            return {"input_ids": [] if isinstance(texts, str) else [[] for _ in texts]}

    [example] = made(task_of(bos="never"), ["One."], Nothing())
    assert (example.key, example.requests, example.text) == ("0", (), "One.")
    assert str(example.error) == "this tokenizer makes no token of the text 'One.'."
    Nothing.eos_token_id = None
    with pytest.raises(ModelError, match="no token that begins or ends a text"):
        made(task_of(bos="never"), ["One."], Nothing())

"""Metrics of generated texts: against sacrebleu and rouge-score on the texts themselves, and plain definitions."""

import math
import random
import re
import string
from decimal import Decimal

import pytest

from petals_eval.errors import ConfigError
from petals_eval.metrics import measure, text_libraries
from petals_eval.metrics.intervals import wilson
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.texts import last_number, numbers_equal, token_f1
from petals_eval.runs.rows import packed
from petals_eval.tasks import GenerationTask
from petals_eval.tasks.requests import Example, Generated

WORDS = re.findall(r"\S+", "the cat sat on a mat and then it saw an old dog , who ran . away quickly over hills")


def corpus(n=60, seed=0):
    """Texts beside one to three right ones, of which some share much and some nothing."""
    dice = random.Random(seed)
    pairs = []
    for _ in range(n):
        right = [" ".join(dice.choices(WORDS, k=dice.randint(3, 14))) for _ in range(dice.randint(1, 3))]
        words = dice.choice(right).split()
        text = " ".join(word if dice.random() < 0.7 else dice.choice(WORDS) for word in words)
        pairs.append((text if dice.random() < 0.9 else "", right))
    return pairs


def measured(pairs, metrics):
    """Through what a task makes of texts and what a journal holds."""
    task = GenerationTask(name="mine", text="{q}", answer_column="a", metrics=metrics)
    rows = []
    for text, right in pairs:
        example = Example("0", None, (), 0, False, "", reference=tuple(right) or None)
        rows.append((None, None, packed(task.predict(example, [Generated((1,), text, "end")]).values)))
    return measure("generation", task.metrics, ScoredRows.of(rows, task.columns))


@pytest.mark.parametrize("seed", range(3))
def test_bleu_and_chrf_of_all_texts_are_sacrebleus(seed):
    import sacrebleu

    pairs = corpus(seed=seed)
    found = measured(pairs, ["bleu", "chrf"])
    texts = [text for text, _ in pairs]
    most = max(len(right) for _, right in pairs)
    streams = [[right[at] if at < len(right) else None for _, right in pairs] for at in range(most)]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(texts, streams, force=True).score, abs=1e-9)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score, abs=1e-9)
    for name in ("bleu", "chrf"):
        low, high = found[name].ci95
        assert 0 <= low < found[name].value < high <= 100


def test_rouge_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    pairs = corpus()
    names = ["rouge1", "rouge2", "rougeL"]
    found = measured(pairs, names)
    scorer = RougeScorer(names, use_stemmer=False)
    for name in names:
        best = [max(scorer.score(each, text)[name].fmeasure for each in right) for text, right in pairs]
        assert found[name].value == pytest.approx(sum(best) / len(best), abs=1e-12)


def squad_f1(text, right):
    """As SQuAD's evaluation describes it, written out."""

    def words(each):
        kept = "".join(letter for letter in each.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    mine, theirs = words(text), words(right)
    common = 0
    left = list(theirs)
    for word in mine:
        if word in left:
            left.remove(word)
            common += 1
    if not mine or not theirs:
        return float(mine == theirs)
    if common == 0:
        return 0.0
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_is_squads():
    pairs = corpus(200)
    for text, right in pairs:
        assert token_f1(text, right) == pytest.approx(max(squad_f1(text, each) for each in right))
    found = measured(pairs, ["token_f1"])["token_f1"]
    mean = sum(max(squad_f1(text, each) for each in right) for text, right in pairs) / len(pairs)
    assert found.value == pytest.approx(mean)
    assert found.ci95[0] < mean < found.ci95[1]


def test_exact_match_is_a_share_with_wilsons_interval():
    pairs = [("yes", ["yes"])] * 7 + [("no", ["yes"])] * 3
    found = measured(pairs, ["exact_match"])["exact_match"]
    assert (found.value, found.ci95) == (0.7, wilson(7, 10))
    assert measured([("yes", ["yes"])], ["exact_match"])["exact_match"].ci95 == wilson(1, 1)


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "bleu", "chrf", "rouge1"])
def test_rows_without_a_right_text_count_in_no_metric_but_those_of_length(metric):
    known = corpus(20)
    some = measured([*known, ("what", []), ("ever", [])], [metric])
    assert some[metric].value == pytest.approx(measured(known, [metric])[metric].value)
    assert some[metric].note.startswith("of 20 of 22 examples")
    assert some["stopped_by_length"].value == 0.0
    none = measured([("what", [])] * 2, [metric])[metric]
    assert (none.value, none.ci95, none.note) == (None, None, "no example has a right text")


def test_counts_of_length():
    task = GenerationTask(name="mine", text="{q}", metrics=["new_tokens"])
    example = Example("0", None, (), 0, False, "")
    made = [Generated((1,) * count, "", "length" if count == 4 else "end") for count in (1, 2, 4, 4)]
    rows = [(None, None, packed(task.predict(example, [each]).values)) for each in made]
    found = measure("generation", task.metrics, ScoredRows.of(rows, task.columns))
    assert found["new_tokens"].value == 11 / 4
    assert (found["stopped_by_length"].value, found["stopped_by_length"].ci95) == (0.5, wilson(2, 4))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it costs $1,234.50 now", "1234.50"),
        ("x = -5", "-5"),
        ("3-2", "2"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("2023.", "2023"),
        ("half is .5", ".5"),
        ("-$7", "-7"),
        ("70%", "70"),
        ("12,345,678 stars", "12345678"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == Decimal(number)


def test_texts_without_a_number():
    assert last_number("none at all, $ or .") is None
    assert numbers_equal("none", ["5"]) == numbers_equal(None, ["5"]) == 0.0
    assert math.isclose(numbers_equal("5.0", ["four", "5"]), 1.0)


def test_a_metric_whose_library_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setitem(text_libraries.LIBRARIES, "bleu", "no_such_library")
    with pytest.raises(ConfigError, match=r"no-such-library.*petals-eval\[text-metrics\]"):
        text_libraries.check_library("bleu")

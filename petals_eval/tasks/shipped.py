"""What the rows of data sets become before the templates of the shipped tasks: each task file names its function.

What comes out is what lm-evaluation-harness 0.4.13 asks of the same rows; tests/interop/test_lm_eval_texts.py holds it.
A function gets a row's values by column, and returns them with others that its task reads.
"""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["arc", "copa", "hellaswag", "lambada", "mnli", "wic", "wikitext", "winogrande"]

Columns = Mapping[str, Any]

_CONNECTORS = {"cause": "because", "effect": "therefore"}


def mnli(row: Columns) -> dict[str, Any]:
    """Return the row with a hypothesis that ends in a full stop."""
    hypothesis = row["hypothesis"].strip()
    return {**row, "hypothesis": hypothesis if hypothesis.endswith(".") else f"{hypothesis}."}


def wic(row: Columns) -> dict[str, Any]:
    """Return the row with the word as the first sentence has it: inflected, at the start of a sentence in capitals."""
    return {**row, "word": row["sentence1"][int(row["start1"]) : int(row["end1"])]}


def copa(row: Columns) -> dict[str, Any]:
    """Return the row with a premise that goes on in "because" or "therefore", and choices that go on from there.

    Each choice begins with a blank, which comes on top of the one that stands before every choice.
    """
    if row["question"] not in _CONNECTORS:
        raise ValueError(f"question should be {' or '.join(_CONNECTORS)}, found {row['question']!r}")
    choices = {name: f" {row[name][:1].lower()}{row[name][1:]}" for name in ("choice1", "choice2")}
    return {**row, **choices, "premise": f"{row['premise'].strip()[:-1]} {_CONNECTORS[row['question']]}"}


def hellaswag(row: Columns) -> dict[str, Any]:
    """Return the row with `query`, the activity and what has happened so far, and `choices`, its endings, both without
    the marks of WikiHow."""
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {**row, "query": _without_marks(query), "choices": [_without_marks(ending) for ending in row["endings"]]}


def _without_marks(text: str) -> str:
    """Return a text of WikiHow as prose: a title becomes a sentence, other words in brackets go."""
    as_sentence = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", as_sentence).replace("  ", " ")


def arc(row: Columns) -> dict[str, Any]:
    """Return the row with `choices`, its texts alone, and `label`, the position of the right one.

    The choices of a question are named A to E, or 1 to 5.
    """
    names, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
    if row["answerKey"] and row["answerKey"] not in names:
        raise ValueError(f"answerKey should be one of {', '.join(names)}, found {row['answerKey']!r}")
    return {**row, "choices": texts, "label": names.index(row["answerKey"]) if row["answerKey"] else None}


def winogrande(row: Columns) -> dict[str, Any]:
    """Return the row with `contexts`, the sentence up to its gap with each option in it, and `ending`, the rest."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("sentence should have a gap, written as _")
    contexts = [before + row["option1"], before + row["option2"]]
    return {**row, "contexts": contexts, "ending": after.strip()}


def lambada(row: Columns) -> dict[str, Any]:
    """Return the row with `context`, the text up to its last word, and `word`, the last one."""
    context, _, word = row["text"].rpartition(" ")
    return {**row, "context": context, "word": word}


# In this order, for one makes what the next one meets: texts as they stand, and regular expressions.
_WIKITEXT: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}"), rf"{shown[0]}\1{shown[1]}")
        for opening, closing, shown in (
            (r"\(", r"\)", "()"),
            (r"\[", r"\]", "[]"),
            ("{", "}", "{}"),
            ('"', '"', '""'),
            ("'", "'", "''"),
        )
    ),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def wikitext(row: Columns) -> dict[str, Any]:
    """Return the row with `text`, the page as it is usually written; WikiText sets blanks around its marks."""
    text = row["page"]
    for found, shown in _WIKITEXT:
        text = text.replace(found, shown) if isinstance(found, str) else found.sub(shown, text)
    return {**row, "text": text}

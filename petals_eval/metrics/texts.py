"""What one generated text is worth beside the right ones: exact match, token F1, equal numbers.

A row's numbers from here are what the journal keeps; the metrics of a run are means over them.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

__all__ = ["exact_match", "last_number", "numbers_equal", "simplified", "token_f1"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<!\d)-)?\$?(?<![\d.])\.\d+")


def simplified(
    text: str, *, remove: Iterable[str] = (), ignore_case: bool = False, ignore_punctuation: bool = False
) -> str:
    """Return a text without what does not count when texts are compared: outer blanks in any case.

    remove: regular expressions, whose matches go first, one after the other; then case, then ASCII punctuation.

    >>> simplified("It is #### 1,234. ", remove=["(?s).*#### ", ",", r"\\.$"])
    '1234'
    """
    text = text.strip()
    for pattern in remove:
        text = re.sub(pattern, "", text)
    if ignore_case:
        text = text.lower()
    if ignore_punctuation:
        text = text.translate(_PUNCTUATION)
    return text.strip()


def exact_match(
    text: str | None,
    references: Sequence[str],
    *,
    remove: Iterable[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
) -> float:
    """Return 1.0 where a text equals one of the right ones after `simplified`, else 0.0; None equals nothing.

    >>> exact_match("Paris.", ["paris", "Lutetia"], ignore_case=True, ignore_punctuation=True)
    1.0
    """
    if text is None:
        return 0.0
    options = {"ignore_case": ignore_case, "ignore_punctuation": ignore_punctuation}
    found, *right = (simplified(each, remove=remove, **options) for each in (text, *references))
    return float(found in right)


def token_f1(text: str | None, references: Sequence[str]) -> float:
    """Return the best F1 of a text's words and those of a right one, in [0, 1].

    As SQuAD has it (Rajpurkar et al., 2016): words in lower case, without punctuation and articles, counted as often as
    they occur. Two texts without a word are equal.

    >>> token_f1("the cat sat", ["A cat sat down.", "no"])
    0.8
    """
    words = _words(text or "")
    return max(_f1(words, _words(each)) for each in references)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, None where there is none. Commas between groups of three and a dollar sign do
    not count.

    >>> last_number("5 + 7 = 12, so she pays $1,012.50.")
    Decimal('1012.50')
    """
    found = [match[0] for match in _NUMBER.finditer(text)]
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def numbers_equal(text: str | None, references: Sequence[str]) -> float:
    """Return 1.0 where the last number of a text is that of a right one, whatever it is written like, else 0.0.

    >>> numbers_equal("The answer is 18.00 dollars", ["9 * 2 = 18\\n#### 18"])
    1.0
    """
    found = None if text is None else last_number(text)
    return float(found is not None and any(found == last_number(each) for each in references))

"""When a text is over, and what is left of it."""

import pytest

from petals_eval.generation.growing_text import GrowingText
from petals_eval.model import LocalModel
from petals_eval.tasks.requests import Decoding
from tests.support.tiny_models import make_tiny

END = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, but for a few words; <s> and </s> are special."""
    return LocalModel.from_pretrained(str(make_tiny("llama", tmp_path_factory.mktemp("llama")))).tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def grown(tokenizer, tokens, **decoding) -> GrowingText:
    text = GrowingText(Decoding(**{"max_new_tokens": 1000, **decoding}), tokenizer, {END})
    for token in tokens:
        if text.add(token) is not None:
            break
    return text


def test_an_end_token_ends_it_and_is_not_part_of_the_text(tokenizer):
    text = grown(tokenizer, [*ids(tokenizer, "abc"), END, *ids(tokenizer, "more")])
    assert (text.generated.text, text.finish, len(text.tokens)) == ("abc", "end", 4)


def test_as_many_tokens_as_there_may_be(tokenizer):
    text = grown(tokenizer, ids(tokenizer, "abcdef"), max_new_tokens=4)
    assert (text.generated.text, text.finish, text.generated.token_ids) == ("abcd", "length", tuple(text.tokens))


@pytest.mark.parametrize("stop", ["Q:", "great", "é", "\n\n", "é and"])
def test_a_stop_sequence_counts_across_tokens_and_is_cut_off(tokenizer, stop):
    """Letters are tokens of their own here, and é is two of them."""
    before = "it is fine"
    text = grown(tokenizer, ids(tokenizer, f"{before}{stop} and so on"), stop=(stop, "never"))
    assert (text.generated.text, text.finish) == (before, "stop")
    assert len(text.tokens) < len(ids(tokenizer, f"{before}{stop} and so on"))


def test_a_stop_sequence_that_ends_inside_a_token(tokenizer):
    """The word is one token with the blank before it."""
    tokens = ids(tokenizer, "so great!")
    assert len(tokens) == 4
    text = grown(tokenizer, tokens, stop=(" gr",))
    assert (text.generated.text, text.finish, len(text.tokens)) == ("so", "stop", 3)


def test_the_first_of_several_stop_sequences_counts(tokenizer):
    text = grown(tokenizer, ids(tokenizer, "one two three"), stop=("three", "two", "wo"))
    assert text.generated.text == "one "


def test_a_stop_sequence_at_the_very_end_counts_before_the_length(tokenizer):
    text = grown(tokenizer, ids(tokenizer, "ab##"), stop=("##",), max_new_tokens=4)
    assert (text.generated.text, text.finish) == ("ab", "stop")


def test_a_stop_sequence_far_back_in_a_long_text_is_found_when_it_comes(tokenizer):
    text = grown(tokenizer, ids(tokenizer, "x" * 300 + "STOP" + "y" * 50), stop=("STOP",))
    assert (text.generated.text, len(text.tokens)) == ("x" * 300, 304)


def test_a_special_token_may_be_a_stop_sequence_though_no_text_shows_it(tokenizer):
    start = tokenizer.bos_token_id
    text = grown(tokenizer, [*ids(tokenizer, "ab"), start, *ids(tokenizer, "cd")], stop=("<s>",))
    assert (text.generated.text, text.finish, len(text.tokens)) == ("ab", "stop", 3)
    assert grown(tokenizer, [*ids(tokenizer, "ab"), start, END]).generated.text == "ab"


def test_a_text_may_be_empty(tokenizer):
    assert grown(tokenizer, [END]).generated.text == ""
    assert grown(tokenizer, ids(tokenizer, "Q: no"), stop=("Q",)).generated.text == ""

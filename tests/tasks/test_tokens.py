"""Pairs of a text and an answer into tokens: by lm-evaluation-harness's rule, written out here in its own terms."""

import json
from typing import Any

import pytest

from petals_eval.errors import ExampleError, ModelError
from petals_eval.tasks.tokens import EncodedPair, encode_pairs, tokenizer_sha256
from tests.support.tiny_models import make_tiny, write_tokenizer

TEXTS = (
    "Lily saw a big dog",
    "Lily saw a big dog ",
    "Tom ran.\n",
    "Tom ran. \n\n ",
    "",
    " ",
    "<s>Once upon a time",
)
ANSWERS = (" and it ran", "  two blanks", "the end", "\nNew line", " ")


def by_the_harness(tokenizer, text, answer, add_bos_token) -> tuple[list[int], list[int]]:
    """`TemplateLM._encode_pair` and the empty context of `loglikelihood`, with `HFLM.tok_encode`."""

    def encode(string, add_special_tokens=None):
        special = add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(tokenizer.decode(start)):
            special = False
        return tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    start = tokenizer.bos_token_id
    if text == "":
        tokens = encode(answer, False)
        return (tokens[:1], tokens[1:]) if tokens[0] == start else ([start], tokens)
    blanks = len(text) - len(text.rstrip())
    if blanks:
        text, answer = text[:-blanks], text[-blanks:] + answer
    whole = encode(text + answer)
    context = encode(text)
    return context, whole[len(context) :]


@pytest.mark.parametrize(("bos", "add_bos_token"), [("auto", None), ("always", True), ("never", False)])
def test_the_tokens_are_those_of_the_harness(tokenizer, bos, add_bos_token):
    compared = 0
    pairs = [(text, answer) for text in TEXTS for answer in ANSWERS]
    for (text, answer), found in zip(pairs, encode_pairs(tokenizer, pairs, bos), strict=True):
        context, tokens = by_the_harness(tokenizer, text, answer, add_bos_token)
        if not context:  # blanks alone and no beginning-of-text token: the harness's own check fails on it
            assert isinstance(found, EncodedPair) and found.context == (tokenizer.bos_token_id,)
        elif isinstance(found, EncodedPair):
            assert (list(found.context), list(found.answer)) == (context, tokens)
            compared += 1
        else:
            whole = tokenizer.encode(text.rstrip() + text[len(text.rstrip()) :] + answer, add_special_tokens=False)
            assert not tokens or whole[: len(context)] != context
    assert compared >= 28


def test_blanks_at_the_end_of_a_text_belong_to_the_answer(tokenizer):
    with_blank, without = encode_pairs(tokenizer, [("Lily saw ", "a dog"), ("Lily saw", " a dog")])
    assert with_blank == without


def test_an_answer_that_begins_inside_a_token_is_an_error(tokenizer):
    assert len(tokenizer.encode("I see the")) < len(tokenizer.encode("I see th")) + len(tokenizer.encode("e")) - 1
    [merged, good] = encode_pairs(tokenizer, [("I see th", "e"), ("I see th", " e")])
    assert isinstance(merged, ExampleError) and isinstance(good, EncodedPair)
    assert "the answer 'e' begins inside a token" in str(merged) and "▁the" in str(merged)


def test_an_answer_without_tokens_is_an_error(tokenizer):
    [found] = encode_pairs(tokenizer, [("Lily saw a dog.", "")])
    assert isinstance(found, ExampleError) and "makes no token of the answer ''" in str(found)


def test_an_answer_alone_stands_after_the_start_token(tokenizer):
    [alone, spelled] = encode_pairs(tokenizer, [("", "a dog"), ("", "<s>a dog")])
    assert isinstance(alone, EncodedPair) and isinstance(spelled, EncodedPair)
    assert alone.context == (tokenizer.bos_token_id,)
    assert alone.answer == tuple(tokenizer.encode("a dog", add_special_tokens=False))
    assert spelled.context == (tokenizer.bos_token_id,)  # it begins with that token itself: not twice


def test_a_tokenizer_without_the_token_that_is_needed(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for token in ("bos_token", "eos_token"):
        settings.pop(token)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    make_tiny("llama", tmp_path / "model", blocks=1)
    (tmp_path / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    bare: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert bare.bos_token_id is None and bare.eos_token_id is None
    with pytest.raises(ModelError, match="no token that begins or ends a text"):
        encode_pairs(bare, [("", "a")])
    with pytest.raises(ModelError, match="bos: always"):
        encode_pairs(bare, [("b", "a")], "always")
    assert encode_pairs(bare, []) == []


def test_what_makes_the_tokens_has_a_hash_that_calls_do_not_change(tmp_path):
    def load():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tmp_path)

    write_tokenizer(tmp_path)
    tokenizer, other = load(), load()
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a b c d"], truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    other.add_tokens(["quagga"])
    assert tokenizer_sha256(other) != before
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer_sha256(tokenizer) == before != tokenizer_sha256(tokenizer, with_chat=True)

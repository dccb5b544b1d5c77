"""Label words: which tokens are asked for, and that their scores are the model's own likelihoods."""

import pytest
import torch

from petals_eval.data import rows_of
from petals_eval.errors import DataError, TaskError
from petals_eval.tasks import ClassificationTask


def task_of(**changes) -> ClassificationTask:
    values = {
        "name": "t",
        "text": "Lily said: {text} She was",
        "label_column": "label",
        "label_names": ["sad", "happy"],
        "label_words": [" sad", " happy"],
        **changes,
    }
    return ClassificationTask(**values)


def only(task, text, tokenizer):
    [made] = task.examples(rows_of([{"text": text, "label": 1}]), tokenizer)
    return made


def test_single_token_words_are_one_request(tokenizer):
    # In this vocabulary "a" and "the" after a blank are one token each.
    made = only(task_of(label_words=[" a", " the"]), "Hello there.", tokenizer)
    [request] = made.requests
    context = tuple(tokenizer("Lily said: Hello there. She was")["input_ids"])
    assert request.input_ids == context
    expected = [tokenizer(f"Lily said: Hello there. She was {word}")["input_ids"][-1] for word in ("a", "the")]
    assert request.targets == tuple((len(context) - 1, token) for token in expected)
    assert (made.n_tokens, made.truncated) == (len(context), False)


def test_longer_words_are_one_request_each(tokenizer):
    made = only(task_of(), "Hello there.", tokenizer)
    context = tokenizer("Lily said: Hello there. She was")["input_ids"]
    assert [request.part for request in made.requests] == [0, 1]
    for request, word in zip(made.requests, (" sad", " happy"), strict=True):
        whole = tokenizer(f"Lily said: Hello there. She was{word}")["input_ids"]
        assert whole[: len(context)] == context
        assert list(request.input_ids) == whole[:-1]
        assert [position for position, _ in request.targets] == list(range(len(context) - 1, len(whole) - 1))
        assert [token for _, token in request.targets] == whole[len(context) :]
    assert made.n_tokens == sum(len(request.input_ids) for request in made.requests)


@pytest.mark.parametrize("words", [(" a", " the"), (" sad", " happy")])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_scores_are_the_models_own_likelihoods(realdata, tokenizer, words, normalize):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(realdata / "stories260K-hf").eval()  # float32, as its file says
    task = task_of(label_words=list(words), normalize=normalize)
    made = only(task, "Hello there.", tokenizer)
    answers = []
    with torch.inference_mode():
        for request in made.requests:
            logits = model(torch.tensor([request.input_ids])).logits[0].log_softmax(-1)
            answers.append(torch.stack([logits[position, token] for position, token in request.targets]))
        expected = []
        context = tokenizer("Lily said: Hello there. She was")["input_ids"]
        for word in words:
            whole = tokenizer(f"Lily said: Hello there. She was{word}")["input_ids"]
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            steps = [logits[at - 1, whole[at]].item() for at in range(len(context), len(whole))]
            expected.append(sum(steps) / (len(steps) if normalize == "mean" else 1))
    found = task.predict(made, answers)
    assert found.scores == pytest.approx(expected, abs=1e-4)
    assert found.prediction == int(torch.tensor(expected).argmax())
    assert sum(found.probabilities) == pytest.approx(1.0)


def test_a_long_text_is_cut_before_the_cue_and_the_word(tokenizer):
    made = only(task_of(max_length=40), "once upon a time " * 30, tokenizer)
    assert made.truncated
    whole = tokenizer("Lily said: " + "once upon a time " * 30 + " She was")["input_ids"]
    words = [tokenizer("x" + word, add_special_tokens=False)["input_ids"] for word in (" sad", " happy")]
    for request, word in zip(made.requests, words, strict=True):
        context = request.input_ids[: request.targets[0][0] + 1]
        assert list(context[-2:]) == whole[-2:]
        assert tokenizer.decode(context).endswith("She was")
        assert list(context[:20]) == whole[:20]
        assert len(request.input_ids) + 1 <= 40
        assert request.targets[-1][1] == word[-1]
    longest = max(len(request.targets) for request in made.requests)
    assert len(context) == 40 - longest


@pytest.mark.parametrize("asked", [{}, {"instruction": "Read this. "}])
def test_a_word_that_begins_inside_a_token_is_no_other_word(tokenizer, asked):
    # "th" + "e" is one token of this vocabulary, and "e" by itself is that of " e".
    made = only(task_of(text="{text}", label_words=["e", " at"], **asked), "I see th", tokenizer)
    assert made.requests == () and "the answer 'e' begins inside a token" in str(made.error)


def test_a_word_that_other_tokens_spell_is_tokenised_by_itself():
    class Tokenizer:
        """A token a letter, but for one that makes one of the two letters of "at"."""

        bos_token = bos_token_id = None

        def __call__(self, texts, **settings):
            if isinstance(texts, str):
                return {"input_ids": _words(texts.replace("at", "@"))}
            return {"input_ids": [_words(text.replace("at", "@")) for text in texts]}

        def decode(self, ids):
            return "".join(map(chr, ids)).replace("@", "at")

    made = only(task_of(text="{text}", label_words=["t", "x"]), "a", Tokenizer())
    assert made.error is None
    assert [target for _, target in made.requests[0].targets] == [ord("t"), ord("x")]


def test_a_closing_token_of_the_tokenizer_is_left_out(realdata):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    closing = AutoTokenizer.from_pretrained(realdata / "stories260K-hf")
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert closing("a")["input_ids"][-1] == 2
    made = only(task_of(), "Hello.", closing)
    assert all(request.input_ids[0] == 1 and 2 not in request.input_ids for request in made.requests)


def test_words_with_the_same_tokens():
    with pytest.raises(TaskError, match=r"'\?' and ' \?' the same tokens .* Choose other words"):
        only(task_of(label_words=["?", " ?"]), "x", _blind)


def test_a_word_without_tokens():
    with pytest.raises(TaskError, match="gives no token for the label word ' happy'"):
        only(task_of(label_words=[" sad", " happy"]), "x", _deaf)


def test_a_maximum_that_leaves_no_room(tokenizer):
    with pytest.raises(TaskError, match="max_length 3 has no room for any text"):
        only(task_of(max_length=3), "Hello there.", tokenizer)


def test_a_text_without_tokens_has_no_place_for_a_word():
    with pytest.raises(DataError, match="makes no token of the text"):
        only(task_of(text="{text}"), "x", lambda texts, **settings: {"input_ids": [[] for _ in texts]})


def _words(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _blind(texts, **settings):
    """A tokenizer that knows no difference between a word and the word after a blank."""
    if isinstance(texts, str):
        return {"input_ids": _words(texts)}
    return {"input_ids": [_words(text.replace(" ?", "?")) for text in texts]}


def _deaf(texts, **settings):
    """A tokenizer that drops the word happy."""
    if isinstance(texts, str):
        return {"input_ids": _words(texts)}
    return {"input_ids": [_words(text.replace(" happy", "")) for text in texts]}

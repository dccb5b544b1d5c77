"""How the harness says that a text is to be generated, and what of it is the answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from petals_eval.errors import ConfigError
from petals_eval.tasks.requests import Decoding, Generated
from petals_eval.validation import closest, shorten

__all__ = ["KEYS", "answer_text", "decoding_of"]

KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
"""What is read of a request's settings; `max_gen_toks` has other names, which the harness itself replaces."""
_CHANGES_NOTHING: Mapping[str, object] = {"num_beams": 1, "repetition_penalty": 1, "use_cache": True}
_TOP_K = 50
"""Where a request that is to be sampled does not say: the default of transformers, and so of `hf`."""


def decoding_of(settings: Mapping[str, Any], eos: str | None, max_gen_toks: int) -> Decoding:
    """Return how to go on from a context.

    settings: of the request. eos: the text of the token that ends one. max_gen_toks: where the request does not say.

    Raises ConfigError for settings that are not known here, but for values that change nothing, and for impossible
    ones.
    """
    given = dict(
        normalize_gen_kwargs({key: value for key, value in settings.items() if value is not None}, max_gen_toks)
    )
    for key, value in given.items():
        if key in KEYS or (key in _CHANGES_NOTHING and value == _CHANGES_NOTHING[key]):
            continue
        raise ConfigError(
            f"generation_kwargs: {key}={shorten(value)} is not known here.{closest(key, KEYS)} There are: "
            f"{', '.join(KEYS)}"
        )
    temperature = float(given.get("temperature", 0.0))
    if given["do_sample"] and temperature <= 0:
        raise ConfigError(f"generation_kwargs: do_sample=true expects a temperature above 0, found {temperature:g}")
    if given["max_gen_toks"] < 1:
        raise ConfigError(f"generation_kwargs: max_gen_toks: expected 1 or more, found {given['max_gen_toks']}")
    stop = tuple(text for text in handle_stop_sequences(given["until"], eos) if text)
    if not given["do_sample"]:
        return Decoding(given["max_gen_toks"], stop)
    import torch

    return Decoding(
        given["max_gen_toks"],
        stop,
        temperature=temperature,
        top_k=int(given.get("top_k", _TOP_K)),
        top_p=float(given.get("top_p", 1.0)),
        seed=torch.initial_seed(),  # what the harness's --seed has set
    )


def answer_text(generated: Generated, tokenizer: Any, stop: Sequence[str], think_end_token: str | int | None) -> str:
    """Return what the harness is answered of a text: without a stop sequence and what was thought before the answer.

    think_end_token: what ends that, a text or a token's number, as for `hf`; None: nothing was thought.
    """
    end = str(think_end_token) if isinstance(think_end_token, int) else think_end_token
    if end is None or not end.isdigit():
        text = tokenizer.decode(list(generated.token_ids), skip_special_tokens=True)
        return str(postprocess_generated_text(text, list(stop), end))
    tokens = list(generated.token_ids)
    if int(end) in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(int(end)) :]
    return str(
        postprocess_generated_text(tokenizer.decode(tokens, skip_special_tokens=True).lstrip(), list(stop), None)
    )

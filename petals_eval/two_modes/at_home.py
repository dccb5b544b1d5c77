"""A Hugging Face model whose blocks run here, and an input for it."""

from typing import Any

from torch import nn

from petals_eval.errors import ModelError

__all__ = ["model_and_input"]


def model_and_input(name: str, revision: str | None, text: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model with its own head, or as a language model, and make its input of a text.

    name: hub name or folder. Raises ModelError.
    """
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        is_classifier = any("SequenceClassification" in each for each in config.architectures or ())
        kind: Any = (
            transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
        )
        model: nn.Module = kind.from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"expected a model of transformers at {name}, with its tokenizer; found: {lines[0]}"
        ) from error
    return model, dict(tokenizer(text, return_tensors="pt"))

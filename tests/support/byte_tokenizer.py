"""A tokenizer whose tokens are bytes: what is asked of a model can be read back from its tokens, to the last blank."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["byte_tokenizer"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """It puts nothing before a text; it has a token that begins one, for texts without a context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({mark: token for token, mark in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|begin|>", clean_up_tokenization_spaces=False, model_max_length=10**6
    )

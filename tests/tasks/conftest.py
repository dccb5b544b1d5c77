"""The tokenizer of a real small model: adds BOS, no EOS, no pad token."""

import pytest


@pytest.fixture(scope="session")
def tokenizer(realdata):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(realdata / "stories260K-hf")

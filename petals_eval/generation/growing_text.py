"""A text as it grows, and whether it is over: an end token, a stop sequence, or as many tokens as there may be."""

from collections.abc import Collection, Sequence
from typing import Any

from petals_eval.tasks.requests import Decoding, Finish, Generated, TokenLikelihoods

__all__ = ["GrowingText"]

_MARGIN = 8
"""Tokens looked back at beyond those that a stop sequence can take at most, one a byte: some spell no text by
themselves, and the first of a text may lose its blank."""


class GrowingText:
    """The new tokens of one text.

    tokens: so far. likelihoods: of each, where the decoding asks for them. finish: why it is over; None while it grows.

    A stop sequence counts however its letters are cut into tokens. One that is a single special token of the tokenizer,
    which no decoded text shows, counts as that token.
    """

    def __init__(self, decoding: Decoding, tokenizer: Any, end_tokens: Collection[int]):
        """end_tokens: those after which a text of the model is over."""
        self.tokens: list[int] = []
        self.likelihoods: list[TokenLikelihoods] = []
        self.finish: Finish | None = None
        self._decoding = decoding
        self._tokenizer = tokenizer
        self._ends = end_tokens
        special = tokenizer.get_added_vocab() if decoding.stop else {}
        self._stop_tokens = {special[stop] for stop in decoding.stop if stop in special}
        self._looked_back = max((len(stop.encode()) for stop in decoding.stop), default=0) + _MARGIN
        self._text = ""

    def add(self, token: int) -> Finish | None:
        """Take the next token; returns why the text is over, or None."""
        self.tokens.append(token)
        if token in self._ends:
            self._end("end", self.tokens[:-1])
        elif token in self._stop_tokens:
            self._end("stop", self.tokens[:-1])
        elif self._may_have_stopped() and self._first_stop(whole := self._decoded(self.tokens)) is not None:
            self._cut(whole)
        elif len(self.tokens) >= self._decoding.max_new_tokens:
            self._end("length", self.tokens)
        return self.finish

    @property
    def generated(self) -> Generated:
        """The text, once it is over."""
        return Generated(tuple(self.tokens), self._text, self.finish or "length", tuple(self.likelihoods))

    def _end(self, finish: Finish, tokens: Sequence[int]) -> None:
        self.finish, self._text = finish, self._decoded(tokens)
        if self._first_stop(self._text) is not None:
            self._cut(self._text)

    def _cut(self, text: str) -> None:
        self.finish, self._text = "stop", text[: self._first_stop(text)]

    def _may_have_stopped(self) -> bool:
        """Return whether the end of the text holds a stop sequence: decoding all of it for each token would take a time
        that grows with its square."""
        if not self._decoding.stop:
            return False
        recent = self._decoded(self.tokens[-self._looked_back :])
        return any(stop in recent for stop in self._decoding.stop)

    def _first_stop(self, text: str) -> int | None:
        """Return where the first stop sequence of a text begins."""
        return min((at for stop in self._decoding.stop if (at := text.find(stop)) >= 0), default=None)

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

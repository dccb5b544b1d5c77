"""A text of any length as windows that a model can read, in which every token is scored once."""

from array import array
from collections.abc import Sequence
from typing import overload

from petals_eval.tasks.requests import Request

__all__ = ["Windows"]


class Windows(Sequence[Request]):
    """The requests of one document, each made when it is asked for.

    The first window holds `start` and the first tokens of the document, and scores as many tokens as it holds. Each
    further one has the `longest` tokens before its last target, and scores those of its targets that no window before
    it has scored: `longest - context + 1`, so that the first of them sees the last `context` tokens of the window
    before. The last window holds as many tokens, however few are left to score. With a context of 1 these are the
    windows of lm-evaluation-harness 0.4.13 (`get_rolling_token_windows`, `make_disjoint_window`).

    A document is kept in 4 bytes a token: a window of n tokens takes about 130 n bytes while it is under way, and a
    document of a million tokens 4 MB, for as long as it is.
    """

    def __init__(self, key: str, tokens: Sequence[int], *, start: int, longest: int, context: int = 1):
        """
        key: of the example. tokens: of the document, at least one.
        start: the token that stands before them. longest: tokens of a window at most.
        context: from 1 to `longest`.
        """
        self._key = key
        self._tokens = array("i", tokens)
        self._start = start
        self._longest = longest
        self._step = longest - context + 1

    def __len__(self) -> int:
        beyond = max(0, len(self._tokens) - self._longest)
        return 1 + -(-beyond // self._step)

    @overload
    def __getitem__(self, part: int) -> Request: ...

    @overload
    def __getitem__(self, part: slice) -> tuple[Request, ...]: ...

    def __getitem__(self, part: int | slice) -> Request | tuple[Request, ...]:
        parts = range(len(self))[part]
        return self._window(parts) if isinstance(parts, int) else tuple(map(self._window, parts))

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows together, so those that are context of another count twice."""
        return min(len(self._tokens), self._longest) + (len(self) - 1) * self._longest

    def _window(self, part: int) -> Request:
        tokens, first = self._tokens, 0
        if part == 0:
            stop = min(self._longest, len(tokens))
            input_ids = (self._start, *tokens[: stop - 1])
        else:
            first = self._longest + (part - 1) * self._step
            stop = min(first + self._step, len(tokens))
            input_ids = tuple(tokens[stop - 1 - self._longest : stop - 1])
        before = len(input_ids) - (stop - first)
        targets = tuple((before + at, token) for at, token in enumerate(tokens[first:stop]))
        return Request(self._key, part, input_ids, targets)

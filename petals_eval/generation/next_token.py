"""Which token comes next: the likeliest one, or one that is drawn."""

import hashlib

import torch

from petals_eval.errors import NotFiniteError
from petals_eval.tasks.requests import Decoding, TokenLikelihoods

__all__ = ["TokenChoice", "token_likelihoods"]


class TokenChoice:
    """Chooses the tokens of one text, one after the other.

    Its draws come from a generator of its own, seeded by the decoding's seed, the key and the part of the request: the
    text does not depend on which others are generated, in which order, or whether a run was interrupted before.
    """

    def __init__(self, decoding: Decoding, key: str, part: int):
        self._decoding = decoding
        self._draws: torch.Generator | None = None
        if decoding.temperature > 0:
            digest = hashlib.sha256(f"{decoding.seed}\0{key}\0{part}".encode()).digest()
            self._draws = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def next(self, logits: torch.Tensor) -> int:
        """Return the next token by logits (vocabulary,), float32 on the CPU. Raises NotFiniteError for NaN or infinity.

        Greedy: the first of the likeliest. Otherwise logits over the temperature; of these the `top_k` highest; of
        these the fewest that have the probability `top_p` together (Holtzman et al., 2019).
        """
        if not bool(logits.max().isfinite()):  # the maximum of values with a NaN among them is NaN
            raise NotFiniteError(
                "expected finite scores of the next token, found NaN or infinity: what the servers answered overflows "
                "the dtype of the computation at home. Choose another one with --dtype (float32)."
            )
        if self._draws is None:
            return int(logits.argmax())
        scores, tokens = (logits.double() / self._decoding.temperature).sort(descending=True, stable=True)
        if self._decoding.top_k:
            scores = scores[: self._decoding.top_k]
        shares = scores.softmax(0)
        before = shares.cumsum(0) - shares
        shares = shares[: max(1, int((before < self._decoding.top_p).sum()))]
        reach = shares.cumsum(0)
        drawn = torch.rand(1, dtype=torch.float64, device="cpu", generator=self._draws) * reach[-1]
        return int(tokens[min(int(torch.searchsorted(reach, drawn, right=True)), len(shares) - 1)])


def token_likelihoods(logits: torch.Tensor, token: int, count: int) -> TokenLikelihoods:
    """Return how likely a token was and the `count` likeliest ones, by logits (vocabulary,).

    >>> found = token_likelihoods(torch.tensor([0.0, 1.0, 2.0]), 1, 2)
    >>> round(found.log_likelihood, 4), [(token, round(value, 4)) for token, value in found.likeliest]
    (-1.4076, [(2, -0.4076), (1, -1.4076)])
    """
    scores = logits.float().log_softmax(-1)
    values, tokens = scores.topk(min(count, len(scores)))
    return TokenLikelihoods(float(scores[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

"""What the length of a call does to a model's rotary embeddings, and so to the numbers of the rows in it.

Source: `transformers.modeling_rope_utils` (5.23) and the Llama and Falcon of transformers 4.34, which Petals 2.2.0
runs. Most kinds of scaling turn a position by the same angle in every call. Two do not:

- longrope takes one set of frequencies where the longest row of a call is within the original length, and another one
  where it is beyond.
- dynamic grows its frequencies with the longest call so far: a server remembers the longest row that anybody sent it,
  and turns every row by the angles made for that one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from petals_eval.errors import ModelError

__all__ = ["RotaryScaling", "rotary_scaling"]

# "mrope" is "default" with positions of several axes, which are equal for text.
_SAME_IN_EVERY_CALL = frozenset({"default", "linear", "yarn", "llama3", "proportional", "mrope"})
_BY_LENGTH_OF_THE_CALL = "longrope"
_BY_CALLS_BEFORE = "dynamic"


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """How a model's rotary embeddings are scaled.

    kind: as the config names it; "default" where nothing is scaled, also in families without rotary embeddings.
    original_length: positions up to which every call turns them alike; None: that is so for every length.
    """

    kind: str = "default"
    original_length: int | None = None

    @property
    def remembers_calls(self) -> bool:
        """Whether a row beyond the original length is computed by what a server was sent before."""
        return self.kind == _BY_CALLS_BEFORE


def rotary_scaling(config: Any) -> RotaryScaling:
    """Read how a model's config scales its rotary embeddings.

    Raises ModelError for a kind that is not known here: whether a row's numbers would depend on the rows beside it, or
    on calls before it, cannot be told then.
    """
    found = RotaryScaling()
    for parameters in _parameters(config):
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind in _SAME_IN_EVERY_CALL:
            found = RotaryScaling(kind) if found.original_length is None else found
            continue
        if kind not in (_BY_LENGTH_OF_THE_CALL, _BY_CALLS_BEFORE):
            known = sorted({*_SAME_IN_EVERY_CALL, _BY_LENGTH_OF_THE_CALL, _BY_CALLS_BEFORE})
            raise ModelError(
                f"the model's config scales its rotary embeddings by rope_type {kind!r:.40}; expected one of "
                f"{', '.join(known)}. Of others it is not known whether a row's numbers depend on the rows beside it."
            )
        if (length := _original_length(config, parameters, kind)) is not None:
            shortest = length if found.original_length is None else min(length, found.original_length)
            found = RotaryScaling(found.kind if found.remembers_calls else kind, shortest)
    return found


def _parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each kind of layer: a config has one set for all of them, or one for each kind.

    transformers 5 keeps them in `rope_parameters`, before that it was `rope_scaling`.
    """
    if getattr(config, "alibi", False):  # a Falcon of that kind has no rotary embeddings, whatever its config says
        return
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    yield from nested or [found]


def _original_length(config: Any, parameters: Mapping[str, Any], kind: str) -> int | None:
    """Return the length above which the angles change; dynamic scaling goes by `max_position_embeddings` alone."""
    length = getattr(config, "max_position_embeddings", None)
    if kind == _BY_LENGTH_OF_THE_CALL:
        # A field of the config itself goes before one of the parameters: so Phi-3's were published.
        own = getattr(config, "original_max_position_embeddings", None)
        length = own or parameters.get("original_max_position_embeddings") or length
    return None if length is None else int(length)

"""Which modules of a model behave otherwise in training, and by what."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Behaviour", "behaviours_of"]

_RATES = ("dropout", "attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "classifier_dropout")
"""Attributes that hold the p of a functional dropout, which has no module of its own: so in Hugging Face's blocks."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A module that behaves otherwise in training mode.

    path: its name in the model; empty for the model itself. kind: "dropout", "batch norm" or "random slope".
    p: of a dropout; None for other kinds. attribute: where the p of a functional dropout stands; None for a module.
    """

    path: str
    module: str
    kind: str
    p: float | None = None
    attribute: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether training mode changes anything: a dropout of 0 does not."""
        return self.p is None or self.p > 0


def behaviours_of(model: nn.Module) -> list[Behaviour]:
    """Return the modules that behave otherwise in training, in the order of the model; dropouts of 0 among them."""
    return [found for path, module in model.named_modules() for found in _behaviours(path, module)]


def _behaviours(path: str, module: nn.Module) -> Iterator[Behaviour]:
    kind = type(module).__name__
    if isinstance(module, _DropoutNd):
        yield Behaviour(path, kind, "dropout", float(module.p))
    elif isinstance(module, _NormBase):
        # Without running statistics it normalises by the batch in both modes.
        if module.track_running_stats:
            yield Behaviour(path, kind, "batch norm")
    elif isinstance(module, nn.RReLU):
        yield Behaviour(path, kind, "random slope")
    else:
        for name in _RATES:
            rate = getattr(module, name, None)
            if isinstance(rate, int | float) and not isinstance(rate, bool):
                yield Behaviour(path, kind, "dropout", float(rate), name)

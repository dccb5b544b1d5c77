"""What stays at home: families, the local tensors of a model, tuned prompts, and the eval-mode guard."""

from petals_eval.model.adapter import Adapter
from petals_eval.model.checkpoint import Checkpoint
from petals_eval.model.eval_mode import evaluating
from petals_eval.model.families import FAMILIES, Family, family_of
from petals_eval.model.local import LocalModel, LocalPart
from petals_eval.model.prompts import load_adapter

__all__ = [
    "FAMILIES",
    "Adapter",
    "Checkpoint",
    "Family",
    "LocalModel",
    "LocalPart",
    "evaluating",
    "family_of",
    "load_adapter",
]

"""A provider of inspect_ai: its tasks, asked of a model whose blocks run on a swarm.

    inspect eval task.py --model petals-eval/bigscience/bloom -M adapter=./prompts -M initial_peers=...

It needs the extra `inspect`. inspect_ai finds it by the entry point that this package declares.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from petals_eval.errors import ConfigError

if find_spec("inspect_ai") is None:
    raise ConfigError(
        "inspect_ai is not installed. It comes with the extra: pip install 'petals-eval[inspect]', or -e '.[inspect]' "
        "in a clone."
    )

from inspect_ai.model import modelapi  # what it imports must be there

if TYPE_CHECKING:
    from petals_eval.integrations.inspect_ai.provider import PetalsEvalAPI

__all__ = ["provider"]


@modelapi(name="petals-eval")
def provider() -> "type[PetalsEvalAPI]":
    """Return the provider. inspect_ai loads all that there are at its start, so what this one imports waits."""
    from petals_eval.integrations.inspect_ai.provider import PetalsEvalAPI

    return PetalsEvalAPI

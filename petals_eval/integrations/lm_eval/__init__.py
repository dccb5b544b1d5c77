"""A backend of lm-evaluation-harness: its tasks, asked of a model whose blocks run on a swarm.

    import lm_eval
    import petals_eval.integrations.lm_eval  # registers the backend "petals-eval"

    settings = "pretrained=bigscience/bloom,adapter=./prompts,initial_peers=..."
    lm_eval.simple_evaluate(model="petals-eval", model_args=settings, tasks=["copa"])

It needs the extra `lm-eval`; `petals-eval lm-eval -- ...` is the harness's own command with this backend.
"""

from importlib.util import find_spec

from petals_eval.errors import ConfigError

if find_spec("lm_eval") is None:
    raise ConfigError(
        "lm-evaluation-harness is not installed. It comes with the extra: pip install 'petals-eval[lm-eval]', or -e "
        "'.[lm-eval]' in a clone."
    )

from petals_eval.integrations.lm_eval.backend import LM  # what it imports must be there

__all__ = ["LM"]

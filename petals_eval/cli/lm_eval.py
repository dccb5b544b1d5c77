"""`petals-eval lm-eval`: the tasks of lm-evaluation-harness, asked of a model on a swarm."""

from typing import Annotated

import typer

__all__ = ["HELP", "SHORT", "lm_eval"]

SHORT = "Run lm-evaluation-harness on a model over a swarm."
HELP = """Run the command of lm-evaluation-harness on a model over a swarm. What stands after -- is its own.

\b
  petals-eval lm-eval -- --tasks hellaswag --limit 100 --output_path results \\
    --model_args pretrained=./my-llama,adapter=./prompts,dht_prefix=my-llama,initial_peers=/ip4/...
  petals-eval lm-eval -- --tasks arc_easy --model_args pretrained=./my-llama,local_swarm=3

Several peers have a + between them. petals_eval/guides/lm_eval.md has the keys of --model_args.
"""


def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="-- ARGUMENT...", help="Of the harness.")] = None,
) -> int:
    typer.echo("starting lm-evaluation-harness", err=True)

    from petals_eval.integrations.lm_eval.command import run_harness

    return run_harness(arguments or [])

"""`petals-eval demo`: the whole way, on this machine, in a minute."""

from typing import Annotated

import typer

__all__ = ["HELP", "SHORT", "demo"]

SHORT = "Evaluate what ships with petals-eval over an embedded swarm."
HELP = """Evaluate the model, prompts and data that ship with petals-eval over an embedded swarm of three servers.

It shows what a run looks like, and what the prompts are worth: the same head without them is near chance.
"""


def demo(
    servers: Annotated[int, typer.Option(metavar="N", help="Servers of the embedded swarm, 1 to 6.", min=1, max=6)] = 3,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Run folder. Default: runs/demo-<time>.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print metrics.json alone on stdout.")] = False,
) -> int:
    from petals_eval.cli.evaluation import execute
    from petals_eval.config import RunSettings
    from petals_eval.demo import demo_paths

    paths = demo_paths()
    return execute(
        RunSettings(
            model=str(paths.model),
            adapter=(str(paths.prompts),),
            task=str(paths.task),
            data=str(paths.data),
            local_swarm=servers,
            without_prompts=True,
            out=out,
            json=json_output,
        )
    )

"""`petals-eval demo`: the whole way, on this machine, in a minute."""

from pathlib import Path
from typing import Annotated, Any

import typer

from petals_eval.cli.flags import flags_of
from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError

__all__ = ["HELP", "SHORT", "demo"]

SHORT = "Evaluate what ships with petals-eval over an embedded swarm."
HELP = """Evaluate the model, prompts and data that ship with petals-eval over an embedded swarm of three servers.

It shows what a run looks like, and what the prompts are worth: the same head without them is near chance. With --export
nothing is evaluated: model, prompts, data and the files that the guides show are copied to a folder, to try them in.

\b
  petals-eval demo
  petals-eval demo --export trial
"""


@flags_of(RunSettings, only=("out", "json_output"))
def demo(
    servers: Annotated[int, typer.Option(metavar="N", help="Servers of the embedded swarm, 1 to 6.", min=1, max=6)] = 3,
    export: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Copy the demo there instead.")] = None,
    **flags: Any,
) -> int:
    from petals_eval.demo import demo_paths, export_demo

    if export is not None:
        if flags:
            raise ConfigError("expected --export alone: nothing is evaluated with it")
        export_demo(export)
        typer.echo(f"in {export}: {', '.join(sorted(path.name for path in export.iterdir()))}")
        return 0

    from petals_eval.cli.evaluation import execute

    paths = demo_paths()
    return execute(
        lambda: RunSettings(
            model=str(paths.model),
            adapter=(str(paths.prompts),),
            task=str(paths.task),
            data=str(paths.data),
            local_swarm=servers,
            without_prompts=True,
            **flags,
        )
    )

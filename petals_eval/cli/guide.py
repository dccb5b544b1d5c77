"""`petals-eval guide`: the guides that come with the package."""

from typing import Annotated

import typer

__all__ = ["HELP", "SHORT", "guide"]

SHORT = "Show a guide, or list the guides."
HELP = """Print a guide as Markdown, or list the guides.

\b
  petals-eval guide
  petals-eval guide tasks
  petals-eval guide tasks | less

The examples run in the folder that petals-eval demo --export makes.
"""


def guide(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A guide.")] = None) -> int:
    from petals_eval.guides import guide_titles, read_guide

    if name is not None:
        typer.echo(read_guide(name), nl=False)
        return 0
    titles = guide_titles()
    width = max(map(len, titles))
    for each, title in titles.items():
        typer.echo(f"{each:<{width}}  {title}")
    typer.echo(
        "\npetals-eval guide NAME prints one. Its examples run in the folder that\n"
        "petals-eval demo --export FOLDER makes."
    )
    return 0

"""The command line: one file a command; each parses, calls one function and prints."""

import sys
from collections.abc import Sequence

import typer

from petals_eval.cli import demo, run, swarm, tasks
from petals_eval.cli.exits import run_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="petals-eval",
    help="Evaluate prompt-tuned language models whose transformer blocks run on a Petals swarm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command(name="run", help=run.HELP)(run.run)
app.command(name="demo", help=demo.HELP)(demo.demo)
app.command(name="swarm", help=swarm.HELP)(swarm.swarm)
app.command(name="tasks", help=tasks.HELP)(tasks.tasks)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from petals_eval import __version__

        typer.echo(f"petals-eval {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `petals-eval`. Exit codes: see petals_eval.cli.exits.run_command."""
    import click

    def command() -> int:
        try:
            return int(app(args=arguments, standalone_mode=False) or 0)
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.exceptions.Abort:
            return 130
        except click.ClickException as error:
            error.show()
            return error.exit_code

    sys.exit(run_command(command))

"""The command line: one file a command; each parses, calls one function and prints."""

import sys
from collections.abc import Sequence

import typer

from petals_eval.cli import bench, bootstrap, compare, demo, health, merge, run, show, swarm, tasks
from petals_eval.cli.command import GroupedCommand
from petals_eval.cli.exit_codes import run_command
from petals_eval.cli.verbose import with_verbose

__all__ = ["app", "main"]

# What typer raises for a wrong flag. Its name is in click or, since typer keeps a copy of click, in typer itself.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="petals-eval",
    help="Evaluate prompt-tuned language models whose transformer blocks run on a Petals swarm.",
    epilog="petals-eval COMMAND --help shows a command's options and examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for module in (run, demo, swarm, bootstrap, merge, show, compare, health, tasks):
    name = module.__name__.rpartition(".")[2]
    register = app.command(name=name, help=module.HELP, short_help=module.SHORT, cls=GroupedCommand)
    register(with_verbose(getattr(module, name)))
app.add_typer(bench.app, name="bench", help=bench.SHORT)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from petals_eval import __version__

        typer.echo(f"petals-eval {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `petals-eval` with `arguments` (None: those of the process) and exit.

    Exit codes: see petals_eval.cli.exit_codes.run_command.
    """

    def command() -> int:
        try:
            code = int(app(args=arguments, prog_name="petals-eval", standalone_mode=False) or 0)
        except UsageError as error:
            error.show()  # type: ignore[attr-defined]
            return 2
        except SystemExit:  # typer's answer to a reader that has left
            raise BrokenPipeError from None
        except typer.Abort:  # what older versions of typer make of Ctrl-C
            raise KeyboardInterrupt from None
        if code == 130:  # what newer ones make of it
            raise KeyboardInterrupt
        return code

    sys.exit(run_command(command))

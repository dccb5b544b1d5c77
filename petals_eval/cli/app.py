"""The command line: one file a command; each parses, calls one function and prints."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from petals_eval.cli.command import GroupedCommand, UsageError
from petals_eval.cli.verbose import with_verbose

__all__ = ["app", "run_app"]

COMMANDS = (
    "run",
    "demo",
    "swarm",
    "bootstrap",
    "merge",
    "show",
    "compare",
    "errors",
    "report",
    "modes",
    "health",
    "tasks",
    "guide",
    "bench",
    "lm-eval",
)


class _Interrupted(Exception):  # it is none, to whom it comes
    """An interrupt on its way past typer, which would make a bare exit code of it and lose what is kept of the run."""

    def __init__(self, interrupt: KeyboardInterrupt):
        self.interrupt = interrupt


class Commands(TyperGroup):
    """The commands. Each is imported when it is asked for: none waits for the settings of the others."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(interrupt) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Of a misspelt one all are made: typer looks among them for what is meant.
        for name in (cmd_name,) if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _command(name)
        return self.commands.get(cmd_name)


def _command(name: str) -> Any:
    function = name.replace("-", "_")
    module = import_module(f"petals_eval.cli.{function}")
    if name == "bench":  # it has commands of its own
        return typer.main.get_command(module.app)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    register = alone.command(name=name, help=module.HELP, short_help=module.SHORT, cls=GroupedCommand)
    register(with_verbose(getattr(module, function)))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    name="petals-eval",
    help="Evaluate prompt-tuned language models whose transformer blocks run on a Petals swarm.",
    epilog="petals-eval COMMAND --help shows a command's options and examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from petals_eval import __version__

        typer.echo(f"petals-eval {__version__}")
        raise typer.Exit


def run_app(arguments: Sequence[str] | None) -> int:
    """Run the command that `arguments` (None: those of the process) name, and return its exit code.

    What goes wrong is raised, but for a wrong flag, which typer explains with the usage; its code is 2.
    """
    try:
        code = int(app(args=arguments, prog_name="petals-eval", standalone_mode=False) or 0)
    except _Interrupted as passed:
        raise passed.interrupt from None
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

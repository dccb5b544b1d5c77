"""How a command of ours reads its flags and shows its help."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand

from petals_eval.config import HEADINGS

__all__ = ["GroupedCommand", "UsageError", "repeat_flag"]

# What typer raises for a wrong flag. Its name is in click or, since typer keeps a copy of click, in typer itself.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_ORDER = ("Arguments", *HEADINGS, "Options")


class GroupedCommand(TyperCommand):
    """A command with its options under headings and its repeatable flags read as users of Petals write them.

    The headings are those of `rich_help_panel`, without rich's boxes; `--initial-peers A B` is two addresses.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._check_values(args)
        # What follows a flag may also be an argument, where there are any.
        takes_arguments = any(each.param_type_name == "argument" for each in self.params)
        several = () if takes_arguments else [flag for each in self.params if each.multiple for flag in each.opts]
        return super().parse_args(ctx, repeat_flag(args, several))

    def _check_values(self, args: list[str]) -> None:
        """Refuse a flag whose value is the next flag: a variable of the shell without a value leaves nothing between
        them, and all the rest would be read one off. Raises UsageError."""
        known = {flag for each in self.params for flag in (*each.opts, *each.secondary_opts)}
        taking = {flag for each in self.params for flag in each.opts if not getattr(each, "is_flag", True)}
        for flag, value in pairwise([*args, None]):
            if flag in taking and (value is None or value in known):
                what = "nothing follows it" if value is None else f"{value} follows it"
                raise UsageError(f"{flag} needs a value, and {what}. Is a variable of the shell empty?")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title in sorted(groups, key=_ORDER.index):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def repeat_flag(arguments: list[str], flags: Sequence[str]) -> list[str]:
    """Return `arguments` with one of these flags put before each of its values but the first.

    >>> repeat_flag(["--initial-peers", "/a", "/b", "--limit", "3"], ("--initial-peers",))
    ['--initial-peers', '/a', '--initial-peers', '/b', '--limit', '3']
    """
    found = arguments[:1]
    flag = None
    for before, argument in pairwise(arguments):
        if before in flags:
            flag = before
        elif argument.startswith("-"):
            flag = None
        elif flag is not None:
            found.append(flag)
        found.append(argument)
    return found

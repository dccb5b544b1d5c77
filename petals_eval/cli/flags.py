"""Flags made from the fields of settings: what a flag means, its unit and its default stand there, once."""

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from petals_eval.config import shown_of
from petals_eval.validation import member_types

__all__ = ["flags_of", "keys_of"]

Command = Callable[..., int]


def flags_of(settings: type[BaseModel], *, only: Collection[str] = ()) -> Callable[[Command], Command]:
    """Return a decorator that gives a command a flag for each field of `settings` that has a heading.

    The command is called with those that were given, under the settings' keys: the others have their defaults there.
    only: the names of fields, if not all.
    """
    fields = {name: field for name, field in settings.model_fields.items() if shown_of(field)["heading"]}
    chosen = list(only or fields)
    flags = [
        inspect.Parameter(
            _parameter(name, fields[name]),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(name, fields[name]),
        )
        for name in chosen
    ]
    keys = {flag.name: fields[name].alias or name for flag, name in zip(flags, chosen, strict=True)}

    def decorate(command: Command) -> Command:
        def with_flags(**values: Any) -> int:
            given = {name: value for name, value in values.items() if name not in keys or value not in (None, [])}
            return command(**{keys.get(name, name): value for name, value in given.items()})

        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        with_flags.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return with_flags

    return decorate


def keys_of(settings: type[BaseModel]) -> dict[str, str]:
    """Return the key of each field by every name that a file may give it: its own, or that of its flag."""
    fields = settings.model_fields.items()
    names = [{field.alias or name, _parameter(name, field)} for name, field in fields]
    return {each: field.alias or name for several, (name, field) in zip(names, fields, strict=True) for each in several}


def _annotation(name: str, field: FieldInfo) -> Any:
    shown = shown_of(field)
    members = set(member_types(field.annotation))
    kind: Any = next((kind for kind in (bool, int, float) if kind in members), str)
    metavar = shown["metavar"] or {int: "N", float: "SECONDS"}.get(kind)
    if metavar is not None and metavar.endswith("...") and "," not in metavar:
        kind = list[str]
    about = f"{field.description}{_default(field)}"
    flag = typer.Option(
        _flag(name, field), metavar=metavar, help=about, rich_help_panel=shown["heading"], show_default=False
    )
    return Annotated[kind | None, flag]


def _default(field: FieldInfo) -> str:
    """Return the default of a field as the help shows it, or an empty text where there is nothing to be said."""
    default = shown_of(field).get("unset") if field.default is None else field.default
    if default is None or default is False or default == () or field.is_required():
        return ""
    values = default if isinstance(default, tuple) else (default,)
    return f" Default: {','.join(map(_text, values))}."


def _text(value: Any) -> str:
    if value is None:
        return "auto"
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "text", value))


def _flag(name: str, field: FieldInfo) -> str:
    return shown_of(field).get("flag") or f"--{name.replace('_', '-')}"


def _parameter(name: str, field: FieldInfo) -> str:
    return _flag(name, field).removeprefix("--").replace("-", "_")

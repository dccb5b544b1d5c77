"""What is wrong with a user's settings or definition, told from pydantic's list of errors: key, expected, found."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

__all__ = ["DEFINITION", "SETTINGS", "Wording", "closest", "closest_beside", "explain", "member_types", "shorten"]


@dataclass(frozen=True, slots=True)
class Wording:
    """How `explain` words a line.

    expected: by pydantic's name of the mistake, with what it says beside it; others are in pydantic's own words.
    wrong, unknown, missing: templates of whole lines. known: what follows an unknown key that resembles no known one.
    nothing: how a value that is None is called.
    """

    expected: Mapping[str, str]
    wrong: str
    unknown: str
    known: str
    missing: str
    nothing: str


SETTINGS = Wording(
    expected={
        "greater_than": "expected more than {gt:g}",
        "greater_than_equal": "expected {ge:g} or more",
        "less_than": "expected less than {lt:g}",
        "less_than_equal": "expected {le:g} or less",
        **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "expected a whole number"),
        **dict.fromkeys(("float_parsing", "float_type"), "expected a number"),
        **dict.fromkeys(("bool_parsing", "bool_type"), "expected true or false"),
        "string_type": "expected text",
        "literal_error": "expected {expected}",
        "tuple_type": "expected a list",
    },
    wrong="{key}: {expected} (found {found})",
    unknown="unknown setting {key!r}.",
    known=" There are: {known}",
    missing="{key} is missing, and it must be given",
    nothing="None",
)
"""For flags and the keys of a run's YAML file."""

DEFINITION = Wording(
    expected={
        "tuple_type": "should be a list, such as [first, second]",
        "model_type": "should be keys and values, such as {{path: reviews.csv}}",
        "dict_type": "should be keys and values, such as {{key: value}}",
    },
    wrong="  {key}: {expected}, found {found}",
    unknown="  {key}: unknown key.",
    known=" Known here: {known}.",
    missing="  {key}: missing, and it must be given.",
    nothing="nothing",
)
"""For a task and its data, which may be a file of its own."""


def explain(error: ValidationError, model: type[BaseModel], wording: Wording = DEFINITION) -> str:
    """Return a line for each mistake: the key, what was expected there and what was found, but never a token.

    model: what failed to validate.
    """
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    # What is missing is what an unknown key is most likely meant for.
    missing = [str(problem["loc"][-1]) for problem in problems if problem["type"] == "missing"]
    # A list whose elements are wrong counts as empty, which nobody would understand.
    inside = {tuple(problem["loc"][:-1]) for problem in problems}
    told = [one for one in problems if not (one["type"] == "too_short" and tuple(one["loc"]) in inside)]
    return "\n".join(_line(problem, model, wording, missing) for problem in told)


def closest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the known name nearest to `word`, or an empty text."""
    found = _nearest(word, list(known))
    return f" Did you mean {found}?" if found else ""


def _nearest(word: str, known: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(known)}
    found = difflib.get_close_matches(word.lower(), list(lowered), n=1)
    return lowered[found[0]] if found else None


def closest_beside(path: Path) -> str:
    """Return ' Did you mean X?' for the path of something that lies in the same folder, or an empty text."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:  # no folder either
        return ""
    found = _nearest(path.name, names)
    return f" Did you mean {path.with_name(found)}?" if found else ""


def shorten(value: object, limit: int = 80) -> str:
    """Return `value` as Python shows it, cut to `limit` characters."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def member_types(expected: Any) -> Iterator[Any]:
    """Yield the types that a union stands for, without what `Annotated` says of them."""
    origin = get_origin(expected)
    if origin is Annotated:
        yield from member_types(get_args(expected)[0])
    elif origin in (Union, UnionType):
        for kind in get_args(expected):
            yield from member_types(kind)
    else:
        yield expected


def _line(problem: dict[str, Any], model: type[BaseModel], wording: Wording, missing: list[str]) -> str:
    location = [str(part) for part in problem["loc"]]
    key, kind, value = ".".join(location), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in _model_at(model, location[:-1]).model_fields.items()]
        meant = closest(location[-1], missing) or closest(location[-1], known)
        return wording.unknown.format(key=key) + (meant or wording.known.format(known=", ".join(known)))
    if kind == "missing":
        return wording.missing.format(key=key)
    if kind in wording.expected:
        expected = wording.expected[kind].format(**problem.get("ctx", {}))
    else:
        expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    found = wording.nothing if value is None else shorten(value)
    if not key:  # of the whole: what was found says little, unless it is of another kind altogether
        return f"{expected}, found {found}" if kind in wording.expected else expected
    if location[-1] == "token":
        return f"{key}: {expected}"
    line = wording.wrong.format(key=key, expected=expected, found=found)
    if kind == "string_type" and isinstance(value, dict | list):
        line += " (in YAML a text that begins with { or [ stands in quotes)"
    return line


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """Return the model whose keys are meant at `location`, through optional fields and mappings of models."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None:  # a key of a mapping: its value's model is already at hand
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        inner = [found for found in candidates if isclass(found) and issubclass(found, BaseModel)]
        model = inner[0] if inner else model
    return model

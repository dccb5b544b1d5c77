"""What is wrong with a user's definition, said from pydantic's list of errors: key, what was expected, what found."""

import difflib
from collections.abc import Iterable
from inspect import isclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

__all__ = ["closest", "explain", "shorten"]

# What pydantic expects, in the words of a YAML file.
_EXPECTED = {
    "tuple_type": "should be a list, such as [first, second]",
    "model_type": "should be keys and values, such as {path: reviews.csv}",
    "dict_type": "should be keys and values, such as {key: value}",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line a mistake: the key, what was expected there and what was found. `model` is what failed to validate."""
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    # A list whose elements are wrong counts as empty, which nobody would understand.
    inside = {tuple(problem["loc"][:-1]) for problem in problems}
    told = [one for one in problems if not (one["type"] == "too_short" and tuple(one["loc"]) in inside)]
    return "\n".join(f"  {_line(problem, model)}" for problem in told)


def closest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known name nearest to `word`, or an empty text."""
    known = list(known)
    lowered = {name.lower(): name for name in reversed(known)}
    found = difflib.get_close_matches(word.lower(), list(lowered), n=1)
    return f" Did you mean {lowered[found[0]]}?" if found else ""


def shorten(value: object, limit: int = 80) -> str:
    """`value` as Python shows it, cut to `limit` characters."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _line(problem: dict[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = sorted(_model_at(model, location[:-1]).model_fields)
        return f"{key}: unknown key.{closest(location[-1], known)} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{key}: missing, and it must be given."
    expected = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    found = "nothing" if problem["input"] is None else shorten(problem["input"])
    if not key:
        return f"{expected}, found {found}" if problem["type"] in _EXPECTED else expected
    line = f"{key}: {expected}, found {found}"
    if problem["type"] == "string_type" and isinstance(problem["input"], dict | list):
        line += " (in YAML a text that begins with { or [ stands in quotes)"
    return line


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The model whose keys are meant at `location`, through optional fields and mappings of models."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None:  # a key of a mapping: its value's model is already at hand
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        inner = [found for found in candidates if isclass(found) and issubclass(found, BaseModel)]
        model = inner[0] if inner else model
    return model

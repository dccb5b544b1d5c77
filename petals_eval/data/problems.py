"""What is wrong with a user's definition, said from pydantic's list of errors: key, what was expected, what found."""

import difflib
from collections.abc import Iterable
from inspect import isclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

__all__ = ["closest", "explain", "shorten"]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line a mistake: the key, what was expected there and what was found. `model` is what failed to validate."""
    return "\n".join(f"  {_line(dict(problem), model)}" for problem in error.errors(include_url=False))


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
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:
        return expected
    line = f"{key}: {expected}, found {shorten(problem['input'])}"
    if isinstance(problem["input"], bool):
        line += " (YAML reads a bare yes, no, on, off, true and false as a truth value: put it in quotes)"
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

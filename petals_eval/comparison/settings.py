"""What a comparison is told."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from petals_eval.config import OUTPUT, Names, Place, Settings, TaskSettings, option, same_as

__all__ = ["CompareSettings"]


def _split(value: object) -> object:
    """Split names in one text at its commas, as they are typed after a flag."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class CompareSettings(Settings, heading=OUTPUT):
    """What is compared, and how it is printed."""

    metrics: Annotated[Names, BeforeValidator(_split)] = option(
        (), "Compare in these metrics.", "NAME,NAME", unset="those that all runs have"
    )
    against: str | None = option(None, "Compare this run or adapter with each other one, and not all pairs.", "NAME")
    task: Place | None = option(
        None, "Task that says what predictions of another tool mean.", "TASK", unset="that of the runs beside them"
    )
    data: Place | None = same_as(TaskSettings, "data", heading=OUTPUT)
    changed: Annotated[int, Field(ge=0)] = option(10, "Show so many of the rows whose prediction changed.")
    with_texts: bool = option(False, "Show the texts of these rows, read again from --data or the task's own.")
    seed: int | None = option(None, "Seed of the bootstrap.", "S", unset="that of the first run")
    json_output: bool = option(False, "Print the comparison as JSON alone on stdout.", flag="--json", alias="json")

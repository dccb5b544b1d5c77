"""What an analysis of errors is told."""

from typing import Annotated

from pydantic import Field, SecretStr

from petals_eval.config import OUTPUT, ModelSettings, Place, PromptSettings, Settings, TaskSettings, option, same_as

__all__ = ["ErrorSettings"]


class ErrorSettings(Settings, heading=OUTPUT):
    """Which rows are shown, and where their texts are."""

    adapter: str | None = option(None, "Adapter, or draw of its shots, that is shown.", "NAME", unset="the first")
    limit: Annotated[int, Field(ge=0)] = option(5, "Rows in each list, and labels that were confused.")
    task: Place | None = option(
        None, "Task that says how the rows are read: a shipped one or its YAML file.", "TASK", unset="that of the run"
    )
    data: Place | None = option(
        None,
        "The data that the run read: a file or hub name.",
        "DATA",
        unset="the task's, where it is what the run read",
    )
    subset: str | None = same_as(TaskSettings, "subset", heading=OUTPUT)
    split: str | None = same_as(TaskSettings, "split", heading=OUTPUT)
    data_revision: str | None = same_as(TaskSettings, "data_revision", heading=OUTPUT)
    token: SecretStr | None = same_as(ModelSettings, "token", heading=OUTPUT)
    allow_task_code: bool = same_as(PromptSettings, "allow_task_code", heading=OUTPUT)
    json_output: bool = option(False, "Print the analysis as JSON alone on stdout.", flag="--json", alias="json")

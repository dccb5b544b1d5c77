"""The demo's own model, prompts and data (README.md beside this file says how they were made)."""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DemoPaths", "demo_paths"]


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo lies on this machine.

    model: a Hugging Face folder, a Llama of 6 blocks.
    prompts: a folder with a Petals `deep_ptune` state dict, 8 prefix tokens and a head for 2 labels.
    data: the held-out examples, one JSON object a line.
    task: the task's YAML file; it names `data` relative to its own folder.
    expected: JSON, the accuracy of a local forward with the prompts and without them.
    """

    model: Path
    prompts: Path
    data: Path
    task: Path
    expected: Path


def demo_paths() -> DemoPaths:
    """Return the demo's folders and files."""
    folder = Path(str(importlib.resources.files(__name__)))
    return DemoPaths(
        model=folder / "model",
        prompts=folder / "prompts",
        data=folder / "data.jsonl",
        task=folder / "task.yaml",
        expected=folder / "expected.json",
    )

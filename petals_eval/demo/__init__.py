"""The demo's own model, prompts and data (README.md beside this file says how they were made)."""

import importlib.resources
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from petals_eval.errors import ConfigError
from petals_eval.guides import example_files

__all__ = ["DemoPaths", "demo_paths", "export_demo"]


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo lies on this machine.

    model: a Hugging Face folder, a Llama of 6 blocks.
    prompts: a folder with a Petals `deep_ptune` state dict, 8 prefix tokens and a head for 2 labels.
    early_prompts: the same prompts as they were after a third of their training, to compare with.
    data: the held-out examples, one JSON object a line.
    task: the task's YAML file; it names `data` relative to its own folder.
    expected: JSON, the accuracy of a local forward with the prompts, with the early ones, and without any.
    """

    model: Path
    prompts: Path
    early_prompts: Path
    data: Path
    task: Path
    expected: Path


def demo_paths() -> DemoPaths:
    """Return the demo's folders and files."""
    folder = Path(str(importlib.resources.files(__name__)))
    return DemoPaths(
        model=folder / "model",
        prompts=folder / "prompts",
        early_prompts=folder / "early-prompts",
        data=folder / "data.jsonl",
        task=folder / "task.yaml",
        expected=folder / "expected.json",
    )


def export_demo(folder: Path) -> None:
    """Copy the demo to a new or empty folder, under the names that the examples of README and guides use, with the YAML
    files that the guides show. Raises ConfigError where something is there already.
    """
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ConfigError(f"--export: expected a new or an empty folder, found {folder}. Choose another one.")
    paths = demo_paths()
    for source, name in ((paths.model, "my-llama"), (paths.prompts, "prompts"), (paths.early_prompts, "early-prompts")):
        shutil.copytree(source, folder / name)
    shutil.copy(paths.data, folder / "reviews.jsonl")
    rows = map(json.loads, paths.data.read_text(encoding="utf-8").splitlines())
    # The same as plain lines: how such data are read is one of the examples.
    (folder / "reviews.txt").write_text("".join(f"{row['label']}: {row['text']}\n" for row in rows), encoding="latin-1")
    for name, text in example_files().items():
        (folder / name).write_text(text, encoding="utf-8")

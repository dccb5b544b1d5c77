"""The documents beside the code name what there is."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MAP, HABITS = ROOT / "petals_eval" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"


def layers() -> list[list[str]]:
    """The packages of the contract, line by line from the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(each for each in settings["contracts"] if each["id"] == "packages")
    return [line.split(" | ") for line in contract["layers"]]


def test_the_map_has_the_packages_in_the_order_of_the_contract() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", MAP.read_text(), re.MULTILINE)
    assert [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in rows] == layers()
    there = {
        path.stem
        for path in (ROOT / "petals_eval").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {name for line in layers() for name in line} == there - {"__init__"}


def test_the_files_that_documents_name_are_there() -> None:
    for document, folders in ((MAP, (MAP.parent, ROOT)), (HABITS, (ROOT,))):
        named = re.findall(r"`((?:\w|[./-])+/(?:\w|[./-])*|\w+\.py)`", document.read_text())
        lost = [
            name for name in named if not any((folder / name).exists() for folder in (*folders, MAP.parent / "cli"))
        ]
        assert set(lost) <= {"utils.py", "../shared/realdata"}


def test_ci_and_the_hooks_call_what_is_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert [command.split()[0] for command in commands] == [".ci/run", ".ci/run"]
    assert (ROOT / ".ci" / "run").is_file()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / "scripts" / "test.sh").read_text()
    assert all(hook["id"].split("-")[0] in script for hook in hooks)


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()

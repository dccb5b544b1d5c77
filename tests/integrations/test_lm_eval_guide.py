"""The guide says what there is, and its examples run."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import petals_eval
from petals_eval.demo import demo_paths
from petals_eval.integrations.lm_eval.decoding import KEYS
from petals_eval.integrations.lm_eval.settings import BackendSettings
from petals_eval.local_swarm import LocalSwarm
from tests.cli.invoking import invoke

GUIDE = (Path(petals_eval.__file__).parent / "guides" / "lm_eval.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's libraries


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = demo_paths()
    shutil.copytree(demo.model, "my-llama")
    shutil.copytree(demo.prompts, "prompts")
    shutil.copy(demo.data, "reviews.jsonl")
    [task] = blocks("yaml")
    Path("reviews_choice.yaml").write_text(task)


def test_every_key_is_named():
    [table] = re.findall(r"^\| keys .*?\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.strip().splitlines()))) - {"peft"}
    assert named == {field.alias or name for name, field in BackendSettings.model_fields.items()}
    for name in KEYS:
        assert f"`{name}`" in GUIDE


@pytest.mark.usefixtures("surroundings")
def test_the_python_example():
    [example] = blocks("python")
    names: dict[str, Any] = {}
    with LocalSwarm("my-llama", servers=2, mode="thread") as swarm:
        names["peers"] = swarm.initial_peers
        exec(example, names)
    assert 0 <= names["results"]["results"]["reviews_choice"]["acc,none"] <= 1
    assert names["manifest"]["requests"] == {"loglikelihood": 100}


@pytest.mark.soak
@pytest.mark.usefixtures("surroundings")
def test_the_command():
    [command] = [block for block in blocks("console") if "petals-eval lm-eval" in block]
    words = shlex.split(command.removeprefix("$ "))
    assert invoke(*words[1:]).code == 0
    again = invoke(*words[1:])
    assert again.code == 0 and "over the swarm" not in again.err  # all of it is in the cache
    assert len(list(Path("results").glob("petals-eval-manifest_*.json"))) == 1

"""The guide says what there is, and its examples run."""

import re
from pathlib import Path
from typing import Any

import pytest

from petals_eval.demo import export_demo
from petals_eval.integrations.lm_eval.decoding import KEYS
from petals_eval.integrations.lm_eval.settings import BackendSettings
from petals_eval.local_swarm import LocalSwarm
from tests.cli.invoking import invoke
from tests.support.pages import Page

GUIDE = Page("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's libraries


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_demo(tmp_path)


def test_every_key_is_named():
    [table] = re.findall(r"^\| keys .*?\n\n", GUIDE.text, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.strip().splitlines()))) - {"peft"}
    assert named == {field.alias or name for name, field in BackendSettings.model_fields.items()}
    for name in KEYS:
        assert f"`{name}`" in GUIDE.text


@pytest.mark.usefixtures("surroundings")
def test_the_python_example():
    [example] = GUIDE.blocks("python")
    names: dict[str, Any] = {}
    with LocalSwarm("my-llama", servers=2, mode="thread") as swarm:
        names["peers"] = swarm.initial_peers
        exec(example, names)
    assert 0 <= names["results"]["results"]["reviews_choice"]["acc,none"] <= 1
    assert names["manifest"]["requests"] == {"loglikelihood": 100}


@pytest.mark.soak
@pytest.mark.usefixtures("surroundings")
def test_the_command():
    [words] = [each.words for each in GUIDE.typed() if each.is_ours]
    assert invoke(*words[1:]).code == 0
    again = invoke(*words[1:])
    assert again.code == 0 and "over the swarm" not in again.err  # all of it is in the cache
    assert len(list(Path("results").glob("petals-eval-manifest_*.json"))) == 1

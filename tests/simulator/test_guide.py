"""The guide of the simulator shows what it prints."""

import re
from pathlib import Path

import pytest

import petals_eval
from petals_eval.simulator.regimes import REGIMES
from tests.cli.invoking import invoke

GUIDE = (Path(petals_eval.__file__).parent / "guides" / "simulator.md").read_text(encoding="utf-8")
SWARM = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0]
BEFORE, AFTER = re.findall(r"^\$ [^\n]*(?:--plot|--compare) [^\n]*\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.mark.soak
def test_it_prints_what_the_guide_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("swarm.yaml").write_text(SWARM)
    assert invoke("bench", "simulate", "swarm.yaml", "--plot", "swarm.svg").out == BEFORE
    Path("before.json").write_text(invoke("bench", "simulate", "swarm.yaml", "--json").out)
    second = SWARM.splitlines()[-2]
    Path("swarm.yaml").write_text(SWARM.replace(second, second.replace("2500}", "2500, leaves: 20}")))
    after = invoke("bench", "simulate", "swarm.yaml", "--compare", "before.json")
    assert (after.code, after.out) == (1, AFTER)


def test_the_swarm_of_the_guide_is_one_and_the_names_are_known(tmp_path):
    few = tmp_path / "swarm.yaml"
    few.write_text(SWARM.replace("rows: 500", "rows: 5"))
    assert invoke("bench", "simulate", str(few)).code == 0
    assert invoke("bench", "simulate", "mixd").code == 2
    assert "mixed" in REGIMES and len(REGIMES) == 15

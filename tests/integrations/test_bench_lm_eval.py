"""The benchmark of the harness's backend runs, and all three clients agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.server_kinds import PETALS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_round_on_a_few_rows(realdata: Path, tmp_path: Path):
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_lm_eval.py"), "--rounds", "1", "--rows", "24"]
    told = {
        "PETALS_EVAL_PETALS_PYTHON": PETALS.find_python(),
        "PETALS_EVAL_REALDATA": str(realdata),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*command, "--batch-sizes", "32", "--json", str(found)], env=os.environ | told, cwd=tmp_path, timeout=500
    )
    assert done.returncode in (0, 1)  # so few rows say nothing about speed
    result = json.loads(found.read_text())
    assert result["rows"] == 24 and set(result["ratios"]) == {"run", "lm-eval"}
    assert [agreement["different"] for agreement in result["agreement"]] == [0, 0]
    assert result["share_of_run"] > 0

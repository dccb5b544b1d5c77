"""The benchmark against Petals' own client runs, agrees with it, and sees every byte on its links."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.server_kinds import PETALS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_a_pair_on_a_few_rows(realdata: Path, tmp_path: Path):
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_vs_petals.py"), "--workload", "trec-test"]
    subprocess.run(
        [*command, "--pairs", "1", "--rows", "48", "--batch-sizes", "16", "--json", str(found)],
        env=os.environ | {"PETALS_EVAL_PETALS_PYTHON": PETALS.find_python(), "PETALS_EVAL_REALDATA": str(realdata)},
        cwd=tmp_path,
        timeout=400,
        check=True,
    )
    result = json.loads(found.read_text())
    assert result["rows"] == 48
    assert [agreement["different"] for agreement in result["agreement"]] == [0]
    assert len(result["ratios"]["longest"]) == len(result["ratios"]["padded"]) == 1
    for record in result["runs"]:
        if record["side"] == "petals, sweep":
            continue
        # Hidden states of 64 float32 go each way over each of the three links, for 8 prompt tokens and the text's.
        least = record["rows"] * 9 * 64 * 4
        assert all(link["bytes_up"] > least and link["bytes_down"] > least for link in record["links"])
        assert 0 < record["floor_share"] < 1
        assert all(seconds > 0 for seconds in record["server_processor_seconds"])
        assert record["accuracy"] > 0.4

"""scripts/bench_scaling.py measures each dimension once and says so in a table, as JSON and in pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_sweep(tmp_path: Path):
    flags = ["--examples", "8", "16", "--servers", "2", "--length", "8", "--repeats", "1", "--delay", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_scaling.py"), *flags, "--json", "found.json", "--plot", "plots"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=200,
        check=True,
        capture_output=True,
        text=True,
    )
    points = json.loads((tmp_path / "found.json").read_text())["points"]
    assert {(point["examples"], point["servers"], point["length"]) for point in points} == {(8, 2, 8), (16, 2, 8)}
    assert all(point["seconds"][0] > 0 and point["busiest_link"][0] > 0 for point in points)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"examples.svg", "servers.svg", "length.svg"}
    assert "a straight line through these" in done.stdout

"""JSON for other programs is JSON whatever the encoding of stdout holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.pages import run_folder


@pytest.mark.parametrize("command", ["compare", "show", "errors"])
def test_labels_that_the_encoding_does_not_hold_are_escaped(command: str, tmp_path: Path) -> None:
    names = ("été", "größer") if command == "compare" else ("été",)
    folder = run_folder(tmp_path / "run", labels=("naïve", "日本"), adapters=names)
    ended = subprocess.run(
        [sys.executable, "-m", "petals_eval", command, str(folder), "--json"],
        env={**os.environ, "PYTHONIOENCODING": "cp932"},
        capture_output=True,
        check=True,
    )
    assert "été" in json.dumps(json.loads(ended.stdout), ensure_ascii=False)

"""hivemind's old flat namespace comes back, whoever imports what first, and in every process of that environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.real_petals import petals_environment
from tests.interop.server_kinds import PETALS

FLAT = "petals_eval.integrations.hivemind_flat"
LOOK = "from hivemind import PeerID, get_dht_time; from hivemind.utils import DHTExpiration, BatchTensorDescriptor;"
SPAWN = """
import multiprocessing

def look():
    from hivemind import PeerID, BatchTensorDescriptor, get_logger, nested_pack

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=look)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
"""


@pytest.mark.parametrize("first", [f"import {FLAT}, hivemind;", f"import hivemind, {FLAT};"])
def test_one_line_restores_it(first, tmp_path):
    subprocess.run([sys.executable, "-c", first + LOOK], check=True, env=petals_environment(tmp_path))


def test_what_hivemind_says_itself_stays(tmp_path):
    check = (
        "import hivemind, hivemind.utils; before = dict(vars(hivemind)) | {'utils': hivemind.utils};"
        f"import {FLAT}; after = vars(hivemind); assert all(after[name] is before[name] for name in before)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, env=petals_environment(tmp_path))


def test_spawned_children_have_it_in_the_petals_environment(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    environment = {name: value for name, value in petals_environment(tmp_path).items() if name != "PYTHONPATH"}
    subprocess.run([PETALS.find_python(), Path("spawn.py")], check=True, env=environment, cwd=tmp_path)

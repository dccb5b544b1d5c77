"""The servers that tests/interop can run: Petals 2.2.0, and what is started today in its place.

Each is in an environment of its own: `.venv-NAME` in this checkout, or wherever PETALS_EVAL_NAME_PYTHON says
(PETALS_EVAL_PETALS_MAIN_PYTHON, PETALS_EVAL_DRIFT_PYTHON, ...). PETALS_EVAL_SERVERS names the kind that the tests start
where they ask for no other: `petals` unless it is set.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["BLOOMBEE", "DRIFT", "KINDS", "PETALS", "PETALS_MAIN", "ServerKind", "chosen_kind"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ServerKind:
    """One kind of server, and in what it differs from the others.

    name: of its environment. package: the Python package that it is. version: what it announces.
    families: what it serves of the tiny models (tests.support.tiny_models.FAMILIES).
    session_tensors: in a step of a session, as its rpc_info says; ours are of three.
    rolls_back: its sessions honour start_from_position.
    script: what makes its environment.
    flags: more arguments of its `run_server`.
    """

    name: str
    package: str
    version: str
    families: tuple[str, ...]
    session_tensors: int = 3
    rolls_back: bool = True
    script: str = "scripts/server_environment.sh"
    flags: tuple[str, ...] = ("--skip_reachability_check",)

    @property
    def variable(self) -> str:
        """The environment variable that says where its Python is."""
        return f"PETALS_EVAL_{self.name.upper().replace('-', '_')}_PYTHON"

    @property
    def python(self) -> str:
        """Where its Python should be."""
        return os.environ.get(self.variable, str(ROOT / f".venv-{self.name}" / "bin" / "python"))

    @property
    def is_there(self) -> bool:
        """Whether it can be run here."""
        return os.access(self.python, os.X_OK)

    @property
    def not_there(self) -> str:
        """What to do where it cannot be run."""
        return f"no Python with {self.name} at {self.python}: run {self.script} or set {self.variable}"

    def find_python(self) -> str:
        """Return its Python. Where there is none the test is skipped, and fails in CI."""
        if not self.is_there:
            if os.environ.get("CI") == "true":
                pytest.fail(self.not_there)
            pytest.skip(self.not_there)
        return self.python


PETALS = ServerKind(
    "petals", "petals", "2.2.0.post1", ("llama", "bloom", "falcon"), rolls_back=False, script="scripts/petals_peer.sh"
)
PETALS_MAIN = ServerKind("petals-main", "petals", "2.3.0.dev2", ("llama", "bloom", "mixtral"))
DRIFT = ServerKind(
    "drift",
    "drift",
    "2.3.0.dev2",
    (
        *("llama", "bloom", "falcon", "mistral", "mixtral", "qwen2", "qwen3"),
        *("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "deepseek_v3"),
    ),
    flags=(),
)
BLOOMBEE = ServerKind("bloombee", "bloombee", "2.3.0.dev2", ("qwen3",), session_tensors=10)
KINDS = {kind.name: kind for kind in (PETALS, PETALS_MAIN, DRIFT, BLOOMBEE)}


def chosen_kind() -> ServerKind:
    """Return the kind that PETALS_EVAL_SERVERS names."""
    name = os.environ.get("PETALS_EVAL_SERVERS", PETALS.name)
    if name not in KINDS:
        raise pytest.UsageError(f"PETALS_EVAL_SERVERS: expected one of {', '.join(KINDS)}, found {name!r}")
    return KINDS[name]

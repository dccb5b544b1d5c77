"""Shared fixtures. The real data lies beside the project; in CI it must be there."""

import os
from pathlib import Path
from random import Random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client-kills", type=int, default=3, help="kills of the client in tests/chaos")
    parser.addoption("--client-seed", type=int, default=1, help="of their moments")
    parser.addoption("--session-kills", type=int, default=10, help="kills of a client with sessions in tests/interop")
    parser.addoption("--session-seed", type=int, default=1, help="of their moments")
    parser.addoption("--server-absence", type=float, default=10.0, help="seconds a server is away in tests/chaos")
    parser.addoption("--soak", action="store_true", help="all cases of tests that otherwise run a sample of theirs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that only scripts/soak.sh has the time for."""
    if config.getoption("--soak"):
        return
    left_out = {item for item in items if item.get_closest_marker("soak") is not None} | _beyond_sample(items)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _beyond_sample(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases of tests marked `sample(k)` beyond k of each, drawn by a seed of its own for each test."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for name, alike in cases.items():
        marker = alike[0].get_closest_marker("sample")
        kept = marker.args[0] if marker is not None else len(alike)
        left_out.update(Random(name).sample(alike, max(0, len(alike) - kept)))
    return left_out


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Look for examples in the package's docstrings alone: what helps the tests may need Petals, or act on import."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real weights, data and prompts (its README says what they are)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "realdata"
    folder = Path(os.environ.get("PETALS_EVAL_REALDATA", default))
    if not (folder / "stories260K-hf").is_dir():
        message = f"the real data is not at {folder}: set PETALS_EVAL_REALDATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def causal_prompt(realdata, tmp_path_factory) -> Path:
    """A prompt that PEFT trained for stories260K-hf as a causal language model: an adapter without a head."""
    from tests.support.train_prompt import train_prompt

    folder: Path = tmp_path_factory.mktemp("adapters") / "stories-prompt"
    train_prompt(realdata / "stories260K-hf", realdata / "tinystories" / "validation.txt", folder)
    return folder


@pytest.fixture(autouse=True)
def same_draws_every_time() -> None:
    """A test that fails fails again: what it draws does not depend on which tests ran before it.

    Not `random`: hivemind draws the identities of DHT nodes from it, and two nodes of a swarm must not have the same.
    """
    torch.manual_seed(0)

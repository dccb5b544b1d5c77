"""One swarm that the tests of the launcher and of a server's RPCs look at: two servers, and one of all blocks."""

import pytest

from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.blocks import BlockSpan
from tests.support.tiny_models import make_tiny
from tests.support.wire_client import WireClient

BLOCKS, HIDDEN = 5, 32


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.llama", blocks=BLOCKS)


@pytest.fixture(scope="package")
def swarm(folder):
    options = {"mode": "thread", "adapters": ("some/lora",), "throughput": 12.5, "max_batch_size": 40_000}
    with LocalSwarm(folder, servers=2, **options) as swarm:
        swarm.add_server((0, 5), dtype="bfloat16", public_name="whole", max_batch_size=64)
        yield swarm


@pytest.fixture(scope="package")
def client(swarm):
    with WireClient(swarm.initial_peers) as client:
        yield client


@pytest.fixture(scope="package")
def local(folder):
    return BlockSpan.load(str(folder), 0, BLOCKS)


@pytest.fixture
def add_server(swarm):
    """Adds servers that are gone after the test, so that the next one finds the swarm as it was."""
    added = []

    def add(span, **options):
        added.append(swarm.add_server(span, **options))
        return added[-1]

    yield add
    for server in added:
        server.stop()
        swarm.servers.remove(server)

"""Real servers, asked by hivemind alone: the helper starts them, and they compute what Hugging Face computes."""

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from tests.interop.conftest import STORIES
from tests.interop.petals_folders import block_states, make_petals_tiny
from tests.interop.real_petals import ONLINE, RawClient, RealPetalsSwarm, in_own_loop
from tests.interop.server_kinds import chosen_kind

INPUT_IDS = torch.tensor([[1, 5, 9, 200, 7, 31], [1, 8, 8, 100, 3, 250]])


async def forward(client: RawClient, server, prefix: str, hidden, prompts=None) -> torch.Tensor:
    """A raw rpc_forward through all blocks of a server."""
    tensors = [hidden, torch.empty(0) if prompts is None else prompts]
    request = runtime_pb2.ExpertRequest(
        uid=" ".join(f"{prefix}.{block}" for block in range(*server.span)),
        tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
        metadata=MSGPackSerializer.dumps({"points": 0, "args_structure": ((b"__T0", b"__T1"), {})}),
    )
    response = await client.stub(server.peer_id).rpc_forward(request)
    return deserialize_torch_tensor(response.tensors[0])


def test_every_block_is_announced_by_its_server(stories):
    async def look():
        async with RawClient(stories.initial_peers) as client:
            return await client.records([f"{STORIES}.{block}" for block in range(5)])

    records = in_own_loop(look)
    for server in stories.servers:
        for block in range(*server.span):
            state, throughput, extra = records[f"{STORIES}.{block}"][server.peer_id]
            assert (state, throughput, extra["torch_dtype"]) == (ONLINE, 10.0, "float32")
            assert (extra["start_block"], extra["end_block"], extra["version"]) == (*server.span, stories.kind.version)


def test_a_server_describes_itself(stories):
    async def ask():
        async with RawClient(stories.initial_peers) as client:
            answer = await client.stub(stories.servers[1].peer_id).rpc_info(runtime_pb2.ExpertUID(uid=f"{STORIES}.2"))
            return MSGPackSerializer.loads(answer.serialized_info)

    info = in_own_loop(ask)
    assert info["version"] == stories.kind.version
    assert info["outputs_schema"][0].dtype is torch.float32


def test_three_servers_compute_what_hugging_face_computes(stories, stories_dir):
    expected = block_states(stories_dir, INPUT_IDS)

    async def pass_through():
        async with RawClient(stories.initial_peers) as client:
            states = expected[:1]
            for server in stories.servers:
                states.append(await forward(client, server, STORIES, states[-1]))
            return states[1:]

    for server, state in zip(stories.servers, in_own_loop(pass_through), strict=True):
        torch.testing.assert_close(state, expected[server.span[1]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", chosen_kind().families)
def test_deep_prompts_reach_every_block_of_a_tiny_model(family, tmp_path):
    folder = make_petals_tiny(family, tmp_path / family)
    prompts = torch.randn(3, 1, 4, 32, generator=torch.Generator().manual_seed(1))
    expected = block_states(folder, INPUT_IDS, prompts)

    async def pass_through(swarm):
        async with RawClient(swarm.initial_peers) as client:
            (server,) = swarm.servers
            plain = await forward(client, server, "tiny", expected[0])
            prompted = await forward(client, server, "tiny", expected[0], prompts)
            return plain, prompted

    with RealPetalsSwarm(folder, [(0, 3)], dht_prefix="tiny") as swarm:
        plain, prompted = in_own_loop(lambda: pass_through(swarm))
    torch.testing.assert_close(plain, block_states(folder, INPUT_IDS)[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prompted, expected[-1], rtol=1e-4, atol=1e-4)


def test_nothing_outlives_the_swarm(stories_dir):
    with RealPetalsSwarm(stories_dir, [(4, 5)], dht_prefix=STORIES) as swarm:
        (server,) = swarm.servers
        folder = server.folder
        assert len(server.processes()) >= 4  # the server, its DHT, a handler, p2pd
    assert server.processes() == []
    assert not folder.exists()

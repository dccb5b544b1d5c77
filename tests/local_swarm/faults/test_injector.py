"""Every fault at the wire: what a client gets from a server that has it, and that the server counts it."""

import time

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError

from petals_eval.errors import MachineError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.server.announce import absent_peer_id
from petals_eval.model.blocks import BlockSpan
from tests.support.tensors import hidden_states
from tests.support.tiny_models import make_tiny
from tests.support.wire_client import TIMEOUT, WireClient, WireSession, chain, request

BLOCKS = 4
SPAN = chain("tiny", 0, 2)
SOON = 5.0  # seconds; a server that is well answers in a hundredth of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


@pytest.fixture(scope="module")
def swarm(folder):
    with LocalSwarm(folder, spans=[(0, 2)], mode="thread", max_batch_size=2**20) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def client(swarm):
    with WireClient(swarm.initial_peers) as client:
        yield client


@pytest.fixture
def server(swarm):
    server = swarm.servers[0]
    yield server
    server.switch()


@pytest.fixture(scope="module")
def local(folder):
    return BlockSpan.load(str(folder), 0, 2)


def states(seed=0, batch=2, seq=6):
    return hidden_states(batch, seq, seed=seed)


def ask(client, server, hidden=None, seconds=TIMEOUT):
    """The tensor of one answer, as it travels."""
    call = client.stub(server.peer_id).rpc_forward(request(SPAN, states() if hidden is None else hidden))
    return client.run(call, seconds).tensors[0]


def answer(client, server, hidden=None):
    return deserialize_torch_tensor(ask(client, server, hidden))


def count(server, name):
    return server.fault_counts().get(name, f.FaultCount())


def counted(server, name, before, times=1):
    """It was counted, each time with a call under way."""
    now = count(server, name)
    return (now.times - before.times, now.in_flight - before.in_flight) == (times, times)


# -- the server ends, is late, or does not answer


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_crash(folder, mode):
    with LocalSwarm(folder, spans=[(0, 2)], mode=mode) as swarm, WireClient(swarm.initial_peers) as client:
        (server,) = swarm.servers
        server.switch(f.Crash(after=1))
        ask(client, server)
        with pytest.raises(Exception):  # noqa: B017 - hivemind raises what the daemon says
            ask(client, server, seconds=SOON)
        deadline = time.monotonic() + SOON
        while server.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.is_alive()
        assert server.fault_counts() == {"crash": f.FaultCount(times=1, in_flight=1)}
        with pytest.raises(MachineError):
            server.switch()


@pytest.mark.parametrize("where", ["before", "middle"])
def test_hang(client, server, where):
    before = count(server, "hang")
    server.switch(f.Hang(where=where))
    with pytest.raises(TimeoutError):
        ask(client, server, seconds=0.5)
    assert counted(server, "hang", before)
    server.switch()
    ask(client, server, seconds=SOON)


def test_hang_in_the_middle_of_a_stream(client, server):
    server.switch(f.Hang(where="middle"))
    whole = request(SPAN, states(batch=8, seq=64))
    parts = []

    async def call():
        async def requests():
            for tensor in whole.tensors:
                yield type(whole)(uid=SPAN, tensors=[tensor], metadata=whole.metadata)

        async for response in await client.stub(server.peer_id).rpc_forward_stream(requests()):
            parts.append(response.tensors[0])

    with pytest.raises(TimeoutError):
        client.run(call(), 1)
    assert [len(part.buffer) for part in parts] == [8 * 64 * 32 * 4 // 2]
    assert parts[0].chunks == 2


def test_slow(client, server):
    server.switch(f.Slow(delay=0.5))
    started = time.monotonic()
    ask(client, server)
    assert time.monotonic() - started >= 0.5


def test_reset(client, server):
    before = count(server, "reset")
    server.switch(f.Reset(at_most=1))
    with pytest.raises(Exception) as broken:
        ask(client, server, seconds=SOON)
    assert not isinstance(broken.value, TimeoutError)
    assert counted(server, "reset", before)
    ask(client, server, seconds=SOON)  # a new connection


def test_info_but_nothing_else(client, server):
    server.switch(f.InfoOnly())
    assert client.info(server.peer_id, "tiny.0")["version"]
    with pytest.raises(TimeoutError):
        ask(client, server, seconds=0.5)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("overload", "overloaded"),
        ("batch_size", r"Task size greater than max_batch_size \(1\)"),
        ("not_served", "does not serve"),
        ("adapter", "adapter not found"),
        ("cache", "Could not allocate 1073741824 bytes"),
    ],
)
def test_refuse(client, server, reason, said):
    server.switch(f.Refuse(reason=reason))
    with pytest.raises(P2PHandlerError, match=said):
        ask(client, server)
    server.switch(f.Refuse(text="go away"))
    with pytest.raises(P2PHandlerError, match="go away"):
        ask(client, server)


def test_a_locked_cache(client, server):
    before = count(server, "locked_cache")
    with WireSession(client, server.peer_id, SPAN, max_length=4) as opened:
        opened.step(states(batch=1, seq=1))
        server.switch(f.LockedCache(at_most=2))
        for _ in range(2):
            with WireSession(client, server.peer_id, SPAN, max_length=4) as session:
                session.send(states(batch=1, seq=0))
                with pytest.raises(TimeoutError):
                    session.receive(0.3)
        assert count(server, "locked_cache").times - before.times == 2
        assert client.info(server.peer_id)["cache_tokens_available"] > 4 * 2
        ask(client, server, seconds=SOON)
        assert opened.step(states(batch=1, seq=1)).shape == (1, 1, 32), "what is open goes on"
    with WireSession(client, server.peer_id, SPAN, max_length=4) as session:
        session.step(states(batch=1, seq=1))


def test_another_layout_of_sessions(client, server):
    assert len(client.info(server.peer_id, "tiny.0")["inference_schema"][0]) == 3
    before = count(server, "other_layout")
    server.switch(f.OtherLayout(tensors=10))
    assert len(client.info(server.peer_id, "tiny.0")["inference_schema"][0]) == 10
    ask(client, server, seconds=SOON)
    with (
        WireSession(client, server.peer_id, SPAN, max_length=4) as session,
        pytest.raises(P2PHandlerError, match="expected 10 tensors in a step, found 3"),
    ):
        session.step(states(batch=1, seq=1))
    assert count(server, "other_layout").times - before.times == 1


# -- the message is malformed


def test_malformed_messages(client, server):
    well = ask(client, server)
    server.switch(f.Truncated(share_left=0.25))
    cut = ask(client, server)
    assert (len(cut.buffer), list(cut.size)) == (len(well.buffer) // 4, list(well.size))
    server.switch(f.Oversized(times=3))
    assert len(ask(client, server).buffer) == 3 * len(well.buffer)
    server.switch(f.WrongShape())
    short = ask(client, server)
    assert deserialize_torch_tensor(short).shape == (2, 5, 32)
    server.switch(f.WrongDtype())
    other = ask(client, server)
    assert deserialize_torch_tensor(other).dtype is torch.float16
    assert client.info(server.peer_id, "tiny.0")["outputs_schema"][0].dtype is torch.float32


# -- the message is well formed, and wrong


def test_not_finite(client, server):
    server.switch(f.NotFinite())
    assert int(answer(client, server).isnan().sum()) == 1


@pytest.mark.parametrize(("bit", "factor"), [(0, -1.0), (1, None)])
def test_flipped_bit(client, server, local, bit, factor):
    server.switch(f.FlippedBit(bit=bit))
    found, expected = answer(client, server), local.forward(states())
    (index,) = torch.where((found != expected).flatten())[0].tolist()
    value = float(expected.flatten()[index])
    if factor is not None:
        assert float(found.flatten()[index]) == factor * value
    else:
        assert found.flatten()[index].abs() > 1e30 or abs(value) >= 1
    assert torch.equal(answer(client, server), found), "the same question, the same answer"
    others = {
        int(torch.where(answer(client, server, states(seed)) != local.forward(states(seed)))[2][0])
        for seed in range(1, 9)
    }
    assert len(others) > 1


@pytest.mark.parametrize("repeats", [True, False])
def test_noise(client, server, local, repeats):
    server.switch(f.Noise(size=0.01, repeats=repeats))
    found, expected = answer(client, server), local.forward(states())
    assert 0.008 < float((found - expected).norm() / expected.norm()) < 0.012
    assert torch.equal(answer(client, server), found) is repeats


def test_a_share_of_the_calls(client, server, local):
    expected = local.forward(states())
    server.switch(f.Noise(share=0.5, repeats=False))
    before = count(server, "noise")
    wrong = [not torch.equal(answer(client, server), expected) for _ in range(40)]
    assert 8 <= sum(wrong) <= 32
    assert counted(server, "noise", before, sum(wrong))
    server.switch(f.Noise(share=0.5, repeats=False))
    assert [not torch.equal(answer(client, server), expected) for _ in range(40)] == wrong, "drawn by the seed"


def test_after_some_calls_and_for_some_time(client, server, local):
    expected = local.forward(states())

    def is_wrong():
        return not torch.equal(answer(client, server), expected)

    server.switch(f.Noise(after=2, at_most=3))
    assert [is_wrong() for _ in range(7)] == [False, False, True, True, True, False, False]
    server.switch(f.Noise(seconds=1.0))
    assert is_wrong()
    time.sleep(1.1)
    assert not is_wrong()


def test_other_weights(client, server, local):
    server.switch(f.OtherWeights(seed=3))
    found = answer(client, server)
    assert torch.equal(found, local.shuffled(3).forward(states()))
    assert float((found - local.forward(states())).norm()) > 0.1 * float(found.norm())
    server.switch()
    assert torch.equal(answer(client, server), local.forward(states()))


def test_swapped(client, server, local):
    before = count(server, "swapped")
    server.switch(f.Swapped())
    truth = [local.forward(states(seed)) for seed in range(3)]
    answers = [answer(client, server, states(seed)) for seed in range(3)]
    assert torch.equal(answers[0], truth[0]) and torch.equal(answers[1], truth[0]) and torch.equal(answers[2], truth[1])
    assert counted(server, "swapped", before, 2)


def test_training_mode(client, server, local):
    server.switch(f.TrainingMode(dropout=0.5))
    assert not torch.equal(answer(client, server), answer(client, server))
    server.switch()
    assert torch.equal(answer(client, server), local.forward(states()))


def test_sessions_have_faults_too(client, server, local):
    server.switch(f.Noise())
    with WireSession(client, server.peer_id, SPAN, max_length=16) as session:
        found = session.step(states())
        assert not torch.equal(found, local.forward(states()))
        server.switch(f.Hang())
        session.send(states(1, seq=1))
        with pytest.raises(TimeoutError):
            session.receive(0.5)


# -- what it says of itself is wrong


def test_records(client, server):
    peer_id = server.peer_id
    server.switch(f.ClaimsSpan(start=1, stop=4), f.ClaimsDtype(dtype="bfloat16"), f.VersionLie(version="9.9"))
    state, _, extra = client.record("tiny.3")[peer_id]
    assert (state, extra["start_block"], extra["end_block"]) == (2, 1, 4)
    assert (extra["torch_dtype"], extra["version"]) == ("bfloat16", "9.9")
    info = client.info(peer_id, "tiny.0")
    assert (info["version"], info["outputs_schema"][0].dtype) == ("9.9", torch.float32)
    with pytest.raises(P2PHandlerError, match=r"does not serve tiny\.3"):
        client.forward(peer_id, "tiny.3", states())

    server.switch(f.JoiningForEver())
    assert client.record("tiny.0")[peer_id][0] == 1
    server.switch()
    assert client.record("tiny.0")[peer_id][0] == 2
    assert client.info(peer_id)["version"] == "2.3.0.dev2"
    assert server.fault_counts()["claims_span"].times == 1


def test_a_record_without_a_server(client, server):
    server.switch(f.RecordWithoutServer())
    invented = absent_peer_id(server.peer_id)
    assert set(client.record("tiny.0")) == {server.peer_id, invented}
    with pytest.raises(Exception):  # noqa: B017 - hivemind raises what the daemon says
        client.run(client.stub(invented).rpc_forward(request(SPAN, states())), SOON)


def test_a_stale_record(client, server):
    lifetime = client.lifetimes("tiny.0")[server.peer_id]
    server.switch(f.StaleRecord())
    with pytest.raises(P2PHandlerError, match="does not serve"):
        ask(client, server)
    assert client.record("tiny.0")[server.peer_id][0] == 2
    assert client.lifetimes("tiny.0")[server.peer_id] <= lifetime
    assert count(server, "stale_record").in_flight == 1


def test_clock_skew(folder):
    with LocalSwarm(folder, spans=[(0, 2)], mode="thread") as swarm, WireClient(swarm.initial_peers) as client:
        (server,) = swarm.servers
        assert client.lifetimes("tiny.0")[server.peer_id] < 300
        server.switch(f.ClockSkew(seconds_off=3600))
        assert client.lifetimes("tiny.0")[server.peer_id] > 3600


# -- in a process of its own


def test_faults_of_a_process_are_switched_while_it_runs(folder, local):
    options = {"mode": "process", "faults": (f.Noise(),)}
    with LocalSwarm(folder, spans=[(0, 2)], **options) as swarm, WireClient(swarm.initial_peers) as client:
        (server,) = swarm.servers
        expected = local.forward(states())
        assert not torch.allclose(answer(client, server), expected, atol=1e-5)
        assert server.fault_counts() == {"noise": f.FaultCount(times=1, in_flight=1)}
        server.switch(f.FlippedBit(bit=0), f.VersionLie(version="1.0"))
        assert int(((answer(client, server) - expected).abs() > 1e-5).sum()) == 1
        assert client.info(server.peer_id)["version"] == "1.0"
        server.switch()
        assert torch.allclose(answer(client, server), expected, atol=1e-5)
        assert server.fault_counts()["flipped_bit"] == f.FaultCount(times=1, in_flight=1)
        assert server.is_alive()

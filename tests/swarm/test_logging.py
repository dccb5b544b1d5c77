"""What can be seen with debug logging: why a hop was chosen, and why it was not. Nothing of the data is in it."""

import ast
import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import petals_eval
from petals_eval.errors import (
    MissingBlocksError,
    PeerRefusedError,
    PeerUnreachableError,
    RequestTooLargeError,
    SwarmError,
)
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.scheduling.push_choice import PushChoice, PushPolicy
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.wire.span import Span
from tests.support.audited_run import AuditedRun, float32
from tests.support.fake_swarm import (
    FakeDirectory,
    FakeTransport,
    ResidualBlocks,
    forward,
    noise,
    pipeline,
    run,
    server,
    set_pace,
)
from tests.support.tensors import hidden_states

PACKAGE = Path(petals_eval.__file__).parent
FULL = "Could not allocate 1024 bytes immediately: out of memory"


@pytest.fixture
def events(caplog):
    """Returns the debug events so far, one a line."""
    caplog.set_level(logging.DEBUG, "petals_eval.swarm")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def swarm(*servers, transport=None, **values):
    transport = transport or FakeTransport(seconds=0)
    transport.info = replace(transport.info, session_tensors=3)
    return pipeline(FakeDirectory(4, *servers), transport, **values), transport


def test_where_a_micro_batch_goes_and_what_was_expected(events):
    pipe, _ = swarm(server("first", 0, 2), server("second", 2, 4))
    run(pipe, hidden_states(2, 8))
    assert "blocks 0:2 to ...first: 16 tokens, expected in 0.020 s, window 0 of 0 token-blocks" in events()
    assert "blocks 2:4 to ...second: 16 tokens" in events()
    assert "...first: blocks 0:2 asked twice: difference 0, rounding explains 0.001" in events()


def test_a_straggler_and_the_replica_that_is_asked_as_well(events):
    async def straggle(runtime):
        transport = FakeTransport(seconds=0.1)
        directory = FakeDirectory(4, server("slow", 0, 4), server("other", 0, 4))
        pipe = pipeline(directory, transport, runtime=runtime, deadline=600)
        window = pipe.peers.of("other").window
        window.on_delivered(window.send(1.0, runtime.monotonic() - 10), runtime.monotonic())
        await forward(pipe, hidden_states(2, 8))
        transport.hanging.add("slow")
        return await forward(pipe, hidden_states(2, 8))

    (_, hops), _ = run_in_virtual_time(straggle)
    assert [hop.peer_id for hop in hops] == ["other"]
    assert "blocks 0:4: nothing from ...slow in time, ...other is asked, too" in events()


def test_a_failure_and_how_long_its_server_is_left_alone(events):
    pipe, transport = swarm(server("gone", 0, 4), server("a", 0, 4))
    set_pace(pipe.peers, "a", 1.0)

    def fail(hop, hidden):
        if hop.peer_id == "gone":
            raise PeerUnreachableError("connection reset")

    transport.on_call = fail
    run(pipe, hidden_states(2, 8))
    assert "...gone: cannot be reached (connection reset); left alone for 0.01 s" in events()


def test_a_limit_that_was_learned(events):
    pipe, transport = swarm(server("small", 0, 4))

    def refuse(hop, hidden):
        if hidden.shape[0] * hidden.shape[1] > 8:
            raise PeerRefusedError("ValueError('Task size greater than max_batch_size (8) on blocks 0:4')")

    transport.on_call = refuse
    run(pipe, hidden_states(2, 8))
    assert "...small: takes 8 tokens in one call" in events()


def test_who_is_quarantined_and_why(events):
    blocks = ResidualBlocks(64)
    blocks.dropout["drops"] = {0: 0.5}
    pipe, _ = swarm(server("drops", 0, 4), transport=FakeTransport(blocks, seconds=0))
    with pytest.raises(MissingBlocksError):
        run(pipe, hidden_states(2, 8, 64))
    assert "...drops: quarantined, is left out (it gave two answers to one question" in events()


@pytest.mark.parametrize(
    ("servers", "expected"),
    [("a", ()), ("ab", ("...a: disputed on blocks 0:4",)), ("abc", ("...a: quarantined, is left out (it answered",))],
)
def test_what_came_of_an_audit(events, servers, expected):
    run = AuditedRun(*map(float32, servers))
    run.blocks.spoil["a"] = noise()
    set_pace(run.peers, "a", 1e-9)
    run.go(5)
    assert all(event in events() for event in expected)
    assert ("...a: audit of blocks 0:4: differs" in events()) == bool(expected)
    if servers == "abc":
        run.go(5)
        assert "audit of blocks 0:4: agrees" in events()


def test_an_audit_that_nobody_could_make(events):
    run = AuditedRun(float32("a"), float32("b"))
    set_pace(run.peers, "b", 1.0)
    run.transport.down = {"b"}
    run.go(5)
    assert "...a: audit of blocks 0:4: nobody could compute it again" in events()


def test_a_session_that_was_refused(events):
    pipe, transport = swarm(server("full", 0, 4), max_tokens_per_call=8)

    def refuse(hop, rows, positions):
        raise PeerRefusedError(FULL)

    transport.on_session = refuse
    with pytest.raises(SwarmError):
        run(pipe, hidden_states(1, 16))
    assert f"...full: no session of 64 tokens now ({FULL}); asked again in 0." in events()


def test_a_server_whose_sessions_are_others(events):
    pipe, transport = swarm(server("fork", 0, 4), max_tokens_per_call=8)
    transport.info = replace(transport.info, session_tensors=10)
    with pytest.raises(RequestTooLargeError):
        run(pipe, hidden_states(1, 16))
    assert "...fork: no session, ever: its sessions have another layout (10 tensors in a step, expected 3)" in events()


def test_a_session_that_goes_on_elsewhere(events):
    pipe, transport = swarm(server("breaks", 0, 4), server("b", 0, 4))
    set_pace(pipe.peers, "b", 1.0)

    def fail(hop, hidden):
        if hop.peer_id == "breaks" and len(transport.calls) > 1:
            raise PeerUnreachableError("the stream ended")

    transport.on_call = fail

    async def two_steps():
        session: RouteSession = pipe.session(Span(0, 4), 1, 8)
        for _ in range(2):
            await session.step(torch.zeros(1, 2, 32))
        await session.close()

    asyncio.run(two_steps())
    assert "...breaks: session on blocks 0:4 ends at position 2: the stream ended" in events()


def test_a_push_that_was_given_up(events):
    servers = (server(name, start, start + 2, version="2.3.0") for name, start in (("says", 0), ("too", 2)))
    pipe, _ = swarm(*servers, push="always")  # they say 2.2.0 when they are asked
    run(pipe, hidden_states(2, 8))
    assert "...says: push given up, 0 of 2 hops done: petals 2.2.0 does not push on what it was pushed" in events()
    assert "...says: no pushes for 5 s" in events()


def test_trials_and_what_they_brought(events):
    choice = PushChoice("auto", PushPolicy(epoch_micro_batches=1, epoch_seconds=0, first_rest=1))
    for second in range(6):
        choice.on_delivered(choice.is_on, 100, float(second))
    assert "pushing is tried" in events()
    assert "micro-batches are sent hop by hop from now on" in events()


def logging_calls():
    """Every call of a logger in the package: where, and its arguments."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("_log", "log", "logger", "logging")
                and node.func.attr in ("debug", "info", "warning", "error", "exception", "critical")
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.args


def test_no_event_is_given_anything_that_holds_the_data():
    """Values of tensors, texts, requests to servers: none is an argument of any logger."""
    calls = list(logging_calls())
    assert len(calls) > 20
    data = {"hidden", "prompts", "answer", "answers", "activations", "tensors", "request", "response", "metadata"}
    data |= {"text", "texts", "row", "rows_of_text", "example", "examples", "ids", "token", "hf_token"}
    for where, arguments in calls:
        for argument in arguments:
            while isinstance(argument, ast.Starred):
                argument = argument.value
            for each in argument.elts if isinstance(argument, ast.Tuple) else [argument]:
                last = getattr(each, "attr", getattr(each, "id", None))
                assert last not in data, where

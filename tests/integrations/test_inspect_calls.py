"""Which calls of inspect get an answer, and which an error, when a server is caught or the swarm cannot."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from petals_eval.errors import DeadlineError, ExampleError, SwarmError
from petals_eval.integrations.inspect_ai.calls import Calls
from petals_eval.remote_model import RequestAnswer
from petals_eval.swarm import ServedHop, SwarmStatus
from petals_eval.swarm.wire.span import Span
from petals_eval.tasks.requests import Decoding, Request

pytestmark = pytest.mark.filterwarnings("ignore")  # of inspect's libraries


class Model:
    """Answers each request with how often it was asked; the first time it is server `first`'s answer.

    caught: servers that were found to be wrong. until: after so many answers there is no server any more.
    """

    adapters = ()

    def __init__(self, first="liar", until=None):
        self.first, self.until = first, until
        self.caught, self.asked = [], []
        self.on_settle = lambda: None
        self.blocks = SimpleNamespace(settle=self.settle, status=self.status)

    def settle(self, on_tick):
        self.on_settle()
        on_tick()

    def status(self):
        found = [SimpleNamespace(server=SimpleNamespace(peer_id=name), is_used=False) for name in self.caught]
        return SwarmStatus(0, ("a",), None, findings=tuple(found))

    def compute(self, requests, adapter, *, on_tick, on_failed, on_notice=None):
        for request in requests:
            if len(self.asked) == self.until:
                raise DeadlineError("stopped at the deadline")
            on_tick()
            if request.key == "too long":
                on_failed(request, ExampleError("too long for every server"))
                continue
            self.asked.append((request.key, request.part))
            times = self.asked.count(self.asked[-1])
            hop = ServedHop(self.first if times == 1 else "honest", Span(0, 4), "2.2.0", "float32", None)
            yield RequestAnswer(request, times, (hop,))

    generate = compute


def requests(key):
    """A text to be generated, and likelihoods."""
    return [Request(key, 0, (1, 2), decoding=Decoding(3)), Request(key, 1, (1, 2), ((0, 2),))]


@contextmanager
def calls_of(model):
    rounds, said = [], []
    calls = Calls(model, say=said.append, on_answered=lambda: rounds.append(len(model.asked)))
    try:
        yield calls, rounds
    finally:
        calls.close()


def test_calls_that_wait_are_asked_together():
    model = Model()
    with calls_of(model) as (calls, rounds):
        futures = [calls.ask(requests(key)) for key in "abc"]
        assert [future.result(10).values for future in futures] == [(1, 1)] * 3
        assert rounds == [6] and calls.answered == 3
        assert model.asked[:3] == [("a", 0), ("b", 0), ("c", 0)], "texts first"
        assert [(server.peer_id, count) for server, count in calls.servers.items()] == [("liar", 3)]


def test_what_a_caught_server_computed_is_computed_again_before_anybody_is_answered():
    model = Model()
    model.on_settle = lambda: model.caught.append("liar")
    with calls_of(model) as (calls, _):
        answer = calls.ask(requests("a")).result(10)
        assert answer.values == (2, 2) and {server.peer_id for server in answer.servers} == {"honest"}


def test_a_server_caught_after_its_answers_were_given_ends_every_call():
    model = Model()
    with calls_of(model) as (calls, _):
        assert calls.ask(requests("a")).result(10).values == (1, 1)
        model.first = "honest"
        model.on_settle = lambda: model.caught.append("liar")
        for key in "bc":
            with pytest.raises(SwarmError, match=r"answers before by servers that were caught since .*Run it again"):
                calls.ask(requests(key)).result(10)
        assert calls.answered == 1


def test_what_was_answered_before_the_swarm_failed_is_given():
    with calls_of(Model(first="honest", until=5)) as (calls, _):
        futures = [calls.ask(requests(key)) for key in "abc"]
        errors = [future.exception(10) for future in futures]
        assert sum(error is None for error in errors) == 2
        assert all(isinstance(error, DeadlineError) for error in errors if error is not None)
        assert calls.answered == 2

    model = Model(until=5)
    model.caught.append("liar")
    with calls_of(model) as (calls, _):
        futures = [calls.ask(requests(key)) for key in "abc"]
        assert all(isinstance(future.exception(10), DeadlineError) for future in futures)


def test_a_request_that_nobody_can_compute_fails_alone():
    with calls_of(Model()) as (calls, _):
        failing, going = calls.ask(requests("too long")), calls.ask(requests("a"))
        assert going.result(10).values == (1, 1)
        with pytest.raises(ExampleError, match="too long for every server"):
            failing.result(10)


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_waited_for():
    model = Model()
    model.compute = lambda *_, **__: 1 / 0
    with calls_of(model) as (calls, _):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                calls.ask(requests("a")).result(10)


def test_closing_ends_calls_that_wait():
    def never(asked, adapter, *, on_tick, **_):
        while True:
            on_tick()
            time.sleep(0.01)
            yield from ()

    model = Model()
    model.generate = never
    with calls_of(model) as (calls, _):
        waiting = calls.ask(requests("a"))
    for ended in (waiting, calls.ask(requests("b"))):
        with pytest.raises(SwarmError, match="closed"):
            ended.result(10)

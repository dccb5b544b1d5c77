"""Whose answers the harness gets, and what its cache keeps when a call ends early or a server is caught."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.model import hash_args

from petals_eval.errors import DeadlineError, SwarmError
from petals_eval.integrations.lm_eval.answers import Answers, Asked
from petals_eval.remote_model import RequestAnswer
from petals_eval.swarm import ServedHop, SwarmStatus
from petals_eval.swarm.wire.span import Span
from petals_eval.tasks.requests import Request


class Swarm:
    """Answers every request with the number of times it was asked; the first time it is server `first`'s answer.

    caught: servers that were found to be wrong. until: after so many answers there is no server any more.
    """

    def __init__(self, first="liar", until=None):
        self.first, self.until = first, until
        self.caught = []
        self.asked = []
        self.on_settle = lambda: None
        self.blocks = SimpleNamespace(settle=self.settle, status=self.status)

    def settle(self, on_tick):
        self.on_settle()
        on_tick()

    def status(self):
        found = [SimpleNamespace(server=SimpleNamespace(peer_id=name), is_used=False) for name in self.caught]
        return SwarmStatus(0, ("a",), None, findings=tuple(found))

    def stream(self, handles):
        for handle in handles:
            if len(self.asked) == self.until:
                raise DeadlineError("stopped at the deadline")
            self.asked.append(handle)
            times = self.asked.count(handle)
            hop = ServedHop(self.first if times == 1 else "honest", Span(0, 4), "2.2.0", "float32", None)
            yield RequestAnswer(Request(handle[0], handle[1], (1,)), torch.tensor(float(times)), (hop,))


def ask(answers, swarm, texts, kind="loglikelihood"):
    """Each text is two requests to the swarm; its answer is their sum."""
    asked = [Asked((text,), ((text, 0), (text, 1)), sum) for text in texts]
    handles = [handle for each in asked for handle in each.needs]
    return answers.answer(kind, asked, swarm.stream, handles, float, is_quiet=True)


def cached(answers):
    answers.hook.dbdict = {}
    return lambda *texts: [answers.hook.dbdict.get(hash_args("loglikelihood", (text,))) for text in texts]


def test_every_answer_is_in_the_cache_and_counted():
    swarm = Swarm()
    answers = Answers(swarm)
    kept = cached(answers)
    assert ask(answers, swarm, ["a", "b"]) == kept("a", "b") == [2.0, 2.0]
    assert answers.requests == {"loglikelihood": 2}
    assert [(server.peer_id, count) for server, count in answers.servers.items()] == [("liar", 2)]


def test_a_request_without_any_for_the_swarm_has_its_answer():
    assert Answers(Swarm()).answer("x", [Asked(("",), (), sum)], Swarm().stream, [], float, is_quiet=True) == [0]


def test_what_a_caught_server_computed_in_a_call_is_computed_again():
    swarm = Swarm()
    answers = Answers(swarm)
    kept = cached(answers)
    swarm.on_settle = lambda: swarm.caught.append("liar")
    assert ask(answers, swarm, ["a", "b"]) == kept("a", "b") == [4.0, 4.0]
    assert {server.peer_id for server in answers.servers} == {"honest"}


def test_a_server_caught_in_a_later_call_ends_that_with_an_error_and_its_answers_leave_the_cache():
    swarm = Swarm()
    answers = Answers(swarm)
    kept = cached(answers)
    assert ask(answers, swarm, ["a"]) == [2.0]
    swarm.first = "honest"
    swarm.on_settle = lambda: swarm.caught.append("liar")
    with pytest.raises(SwarmError, match=r"1 answers that the harness was given before .*Run it again"):
        ask(answers, swarm, ["b"])
    assert kept("a", "b") == [None, 2.0]


def test_a_call_that_ends_early_leaves_whole_answers_of_trusted_servers_alone():
    swarm = Swarm(first="honest", until=5)
    answers = Answers(swarm)
    kept = cached(answers)
    with pytest.raises(DeadlineError) as raised:
        ask(answers, swarm, ["a", "b", "c"])
    assert kept("a", "b", "c") == [2.0, 2.0, None]
    assert "2 of 3 requests of the harness are kept in its cache" in raised.value.__notes__[0]
    assert answers.requests == {"loglikelihood": 2}

    swarm = Swarm(until=5)
    answers = Answers(swarm)
    kept = cached(answers)
    swarm.caught.append("liar")
    with pytest.raises(DeadlineError):
        ask(answers, swarm, ["a", "b", "c"])
    assert kept("a", "b", "c") == [None, None, None]
    assert (answers.requests, answers.servers) == ({}, {})


def test_without_a_cache_it_is_said_that_answers_are_lost():
    swarm = Swarm(until=2)
    with pytest.raises(DeadlineError) as raised:
        ask(Answers(swarm), swarm, ["a", "b"])
    assert "1 of 2 requests of the harness are lost: with --use_cache" in raised.value.__notes__[0]

"""Calls of the harness, each waiting for its own answer, asked of the swarm together."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petals_eval.errors import PetalsEvalError, SwarmError
from petals_eval.evaluation.scoring import server_used
from petals_eval.runs.manifest import ServerUsed
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.tasks.requests import Request
from petals_eval.text import listed

if TYPE_CHECKING:
    from petals_eval.remote_model import RemoteModel, RequestAnswer

__all__ = ["Answer", "Calls"]

_PAUSE = 0.2
"""Seconds without another call after which those that wait are asked: a harness makes its calls one after the other."""

_CLOSED = "the connection was closed, and the harness still waits for answers."


@dataclass(frozen=True, slots=True)
class Answer:
    """What the swarm answered to the requests of a call, in their order, and who took part in it."""

    values: tuple[Any, ...]
    servers: frozenset[ServerUsed]


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    requests: tuple[Request, ...]
    future: "Future[Answer]"


class Calls:
    """Asks a model's swarm what waits, all of it together, in a thread of its own.

    An answer is given when its audits are done. What a server had a part in that is caught is computed again; if
    something of it was given before, every call from then on ends with an error: the harness has a wrong answer. Where
    the swarm cannot, calls that it has answered get their answers, and the others the reason.

    answered: calls so far. servers: how many each took part in. on_answered: called before the answers of a round are
    given; an error of its is given in their place. say: shows a person a line.
    """

    def __init__(self, model: "RemoteModel", *, say: Callable[[str], object], on_answered: Callable[[], object]):
        self.answered = 0
        self.servers: Counter[ServerUsed] = Counter()
        self._model, self._say, self._on_answered = model, say, on_answered
        self._said: set[str] = set()
        self._caught: frozenset[str] = frozenset()
        self._is_closed = False
        self._waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="petals-eval-inspect", daemon=True)
        self._thread.start()

    def ask(self, requests: Sequence[Request]) -> "Future[Answer]":
        """Have requests answered; their keys and parts must be unlike those of all calls that wait.

        The future raises SwarmError, or ExampleError for what nobody can compute.
        """
        call = _Call(tuple(requests), Future())
        if self._is_closed:
            call.future.set_exception(SwarmError(_CLOSED))
        else:
            self._waiting.put(call)
        return call.future

    def close(self) -> None:
        """Give up what is under way, and end."""
        self._is_closed = True
        self._waiting.put(None)
        self._thread.join()

    # -- in the thread

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            together, is_over = [first], False
            while not is_over:
                try:
                    following = self._waiting.get(timeout=_PAUSE)
                except queue.Empty:
                    break
                is_over = following is None
                if following is not None:
                    together.append(following)
            self._answer(together)
            if is_over:
                return

    def _answer(self, calls: Sequence[_Call]) -> None:
        """Answer these calls, one way or the other."""
        outcomes: Sequence[Answer | BaseException]
        try:
            outcomes = self._outcomes(calls)
            self._on_answered()
        except BaseException as error:  # noqa: BLE001  # handed to whoever waits: nobody looks at this thread
            outcomes = [error] * len(calls)
        for call, outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, Answer):
                call.future.set_result(outcome)
            else:
                call.future.set_exception(outcome)

    def _outcomes(self, calls: Sequence[_Call]) -> list[Answer | PetalsEvalError]:
        """Return each call's answer, or why it has none."""
        found: dict[tuple[str, int], RequestAnswer] = {}
        failed: PetalsEvalError | None = None
        failures: dict[tuple[str, int], PetalsEvalError] = {}
        try:
            self._collect(calls, found, failures)
        except PetalsEvalError as error:
            failed = error
        wrong = [server for server in self.servers if server.peer_id in self._caught]
        if wrong:
            failed = SwarmError(
                f"the harness was given answers before by servers that were caught since "
                f"({listed([short_peer(server.peer_id) for server in wrong])}), and its numbers would hold them. Run "
                "it again."
            )
            found = {}
        outcomes: list[Answer | PetalsEvalError] = []
        for call in calls:
            handles = [(request.key, request.part) for request in call.requests]
            answers = [found[handle] for handle in handles if handle in found]
            servers = frozenset(server_used(hop) for answer in answers for hop in answer.hops)
            reason = next((failures[handle] for handle in handles if handle in failures), failed)
            if len(answers) == len(handles) and not self._is_caught(servers):
                self.answered += 1
                self.servers.update(servers)
                outcomes.append(Answer(tuple(answer.answer for answer in answers), servers))
            else:
                outcomes.append(reason or SwarmError("a server was caught with a wrong answer."))
        return outcomes

    def _collect(
        self,
        calls: Sequence[_Call],
        found: "dict[tuple[str, int], RequestAnswer]",
        failures: dict[tuple[str, int], PetalsEvalError],
    ) -> None:
        """Find the answers to all requests, until nobody is caught who took part in one."""
        left = [request for call in calls for request in call.requests]
        while left:
            left.sort(key=lambda request: len(request.input_ids), reverse=True)
            for answers in self._streams(left, failures):
                with closing(answers):
                    for answer in answers:
                        found[answer.request.key, answer.request.part] = answer
            self._model.blocks.settle(on_tick=self._tick)
            left = [
                found.pop(handle).request
                for handle, answer in list(found.items())
                if self._is_caught(map(server_used, answer.hops))
            ]

    def _streams(
        self, requests: Sequence[Request], failures: dict[tuple[str, int], PetalsEvalError]
    ) -> "Iterator[Any]":
        """Yield the streams of answers: those of texts, and those of likelihoods."""
        adapter = self._model.adapters[0] if self._model.adapters else None

        def fail(request: Request, error: PetalsEvalError) -> None:
            failures[request.key, request.part] = error

        texts = [request for request in requests if request.decoding is not None]
        scored = [request for request in requests if request.decoding is None]
        if texts:
            yield self._model.generate(texts, adapter, on_tick=self._tick, on_failed=fail, on_notice=self._say_once)
        if scored:
            yield self._model.compute(scored, adapter, on_tick=self._tick, on_failed=fail)

    def _is_caught(self, servers: "Iterator[ServerUsed] | frozenset[ServerUsed]") -> bool:
        return any(server.peer_id in self._caught for server in servers)

    def _tick(self) -> None:
        if self._is_closed:
            raise SwarmError(_CLOSED)
        status = self._model.blocks.status()
        for notice in (*status.notices, *([f"waiting for the swarm: {status.waiting}"] if status.waiting else ())):
            self._say_once(notice)
        self._caught |= {each.server.peer_id for each in status.findings if not each.is_used}

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

"""Numerical noise of the harness's likelihoods: some of each call computed again otherwise, to see how far they go."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from petals_eval.errors import ExampleError, PetalsEvalError
from petals_eval.evaluation.noise import NoisePolicy, another_size, attempts, limited, not_tried, rows_each_way
from petals_eval.integrations.lm_eval.answers import Asked, Given, Handle
from petals_eval.runs.manifest import Recomputed, RecomputeWay
from petals_eval.tasks.requests import Request

if TYPE_CHECKING:
    from petals_eval.model import Adapter
    from petals_eval.remote_model import RemoteModel

__all__ = ["LikelihoodNoise"]

_NUMBER = "log_likelihood"


class LikelihoodNoise:
    """How far log-likelihoods moved, in nats, over all calls of the harness.

    As much is computed again as of a run (`petals_eval.evaluation.noise`): a hundredth, or a little more of small
    calls. Of texts nothing is. notes: what could not be tried or measured, and why.
    """

    def __init__(self, model: "RemoteModel", adapter: "Adapter | None"):
        self.notes: dict[str, None] = {}
        self._model, self._adapter = model, adapter
        self._moved: defaultdict[RecomputeWay, list[float]] = defaultdict(list)

    @property
    def recomputed(self) -> tuple[Recomputed, ...]:
        """Of each way that was tried, how many requests of the harness moved how far."""
        return tuple(
            Recomputed(way, _NUMBER, len(moved), sum(moved) / len(moved), max(moved), None)
            for way, moved in self._moved.items()
        )

    def measure(
        self,
        given: Sequence[Given],
        results: Sequence[Any],
        request_of: Callable[[Handle], Request],
        value_of: Callable[[Any], Any],
        *,
        took: float,
        on_tick: Callable[[], object],
    ) -> None:
        """Compute some requests of a call again.

        given, results: all of the call, with who computed each. request_of, value_of: as in the call. took: its
        seconds.

        What fails is noted, with the reason, and never fails the call.
        """
        tick = limited(took, on_tick)
        used = list(dict.fromkeys(server.peer_id for _, _, servers in given for server in servers))
        with contextlib.ExitStack() as stack:
            ways = attempts(used, self._model, stack)
            count = rows_each_way(len(given), len(ways))
            if not count:
                self.notes[f"not measured in a call: of {len(given):,} requests too few can be computed again"] = None
                return
            self.notes |= dict.fromkeys(not_tried(ways))
            for attempt in ways:
                avoided = set(attempt.avoided)
                rows = [
                    index
                    for index, (_, asked, servers) in enumerate(given)
                    if asked.needs and (not avoided or any(server.peer_id in avoided for server in servers))
                ]
                rows = rows[:: max(1, len(rows) // count)][:count]  # spread: tasks stand one after the other
                try:
                    if len(rows) < NoisePolicy.fewest:
                        raise ExampleError(f"only {len(rows)} requests can be compared")
                    asked = [given[row][1] for row in rows]
                    with attempt.open() as other:
                        again = self._again(other, asked, request_of, value_of, tick)
                except PetalsEvalError as error:
                    self.notes[attempt.failed(error)] = None
                else:
                    pairs = zip((results[row] for row in rows), again, strict=True)
                    self._moved[attempt.way] += [abs(_likelihood(old) - _likelihood(new)) for old, new in pairs]

    def _again(
        self,
        model: "RemoteModel",
        asked: Sequence[Asked],
        request_of: Callable[[Handle], Request],
        value_of: Callable[[Any], Any],
        on_tick: Callable[[], object],
    ) -> list[Any]:
        """Return the answers to requests of the harness, computed in other company."""
        requests = [request_of(handle) for handle in dict.fromkeys(need for each in asked for need in each.needs)]
        prefix = 0 if self._adapter is None else self._adapter.prefix_length
        size = another_size(self._model, prefix + max(len(request.input_ids) for request in requests))
        stream = model.compute(requests, self._adapter, tokens_per_micro_batch=size, on_tick=on_tick)
        with contextlib.closing(stream):
            values = {(found.request.key, found.request.part): value_of(found.answer) for found in stream}
        return [each.result([values[need] for need in each.needs]) for each in asked]


def _likelihood(result: Any) -> float:
    """Return the log-likelihood in an answer to the harness, where whether it is greedy may stand behind it."""
    return float(result[0] if isinstance(result, tuple) else result)

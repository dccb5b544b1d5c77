"""Requests of the harness, answered over a swarm: taken as a whole, and each handed to its cache as it comes."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lm_eval.api.model import CacheHook, hash_args
from tqdm import tqdm

from petals_eval.errors import PetalsEvalError, SwarmError
from petals_eval.evaluation.scoring import server_used
from petals_eval.runs.manifest import ServerUsed
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.text import listed

if TYPE_CHECKING:
    from petals_eval.remote_model import RemoteModel, RequestAnswer

__all__ = ["Answers", "Asked", "Given", "Handle"]

_log = logging.getLogger("petals_eval")

Handle: TypeAlias = tuple[str, int]
"""The key and the part of a request to the swarm."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the harness.

    arguments: by which its cache knows it. needs: the requests to the swarm, each once, that it is made of; several of
    the harness's may need the same one. result: makes its answer of theirs, in this order.
    """

    arguments: tuple[Any, ...]
    needs: tuple[Handle, ...]
    result: Callable[[list[Any]], Any]


Given: TypeAlias = tuple[str, Asked, frozenset[ServerUsed]]
"""The name of a call, a request of it, and who took part in its answer."""


class Answers:
    """What the harness was answered over one model's swarm, and by whom.

    model: of whom. hook: of the harness's cache. requests: how many of each kind were answered. servers: how many each
    took part in. given: all that was answered, call by call, each in the order of its requests.

    An answer counts as long as nobody who took part in it is caught. Of a call under way it is computed again; what
    came of an earlier call is in the harness's hands, so that it is taken out of the cache and the call ends with an
    error: the numbers would hold a wrong answer.
    """

    def __init__(self, model: "RemoteModel") -> None:
        self.hook = CacheHook(None)
        self.requests: Counter[str] = Counter()
        self.servers: Counter[ServerUsed] = Counter()
        self.model = model
        self.given: list[Given] = []
        self._caught: frozenset[str] = frozenset()
        self._recalled: set[str] = set()
        self._said: set[str] = set()
        self._progress: tqdm | None = None

    def answer(
        self,
        kind: str,
        asked: Sequence[Asked],
        stream: "Callable[[Iterable[Handle]], Generator[RequestAnswer]]",
        handles: Iterable[Handle],
        value_of: Callable[[Any], Any],
        *,
        is_quiet: bool,
    ) -> list[Any]:
        """Return the answers to a call of the harness, in its order.

        kind: the name of the call. stream: asks the swarm; handles: what it is asked, in this order. value_of: what is
        kept of an answer of the swarm. is_quiet: whether no progress is shown.

        Raises SwarmError where the swarm cannot, and ExampleError for a request that nobody can compute: the harness
        knows no failures. What was answered by then is in its cache.
        """
        waiting: defaultdict[Handle, list[int]] = defaultdict(list)
        for index, each in enumerate(asked):
            for handle in each.needs:
                waiting[handle].append(index)
        missing = [len(each.needs) for each in asked]
        values: dict[Handle, Any] = {}
        served: dict[Handle, frozenset[ServerUsed]] = {}
        results: list[Any] = [each.result([]) if not each.needs else None for each in asked]
        left: Iterable[Handle] = handles

        def take(found: "RequestAnswer") -> None:
            handle = found.request.key, found.request.part
            values[handle], served[handle] = value_of(found.answer), frozenset(map(server_used, found.hops))
            for index in waiting[handle]:
                missing[index] -= 1
                if not missing[index]:
                    one = asked[index]
                    results[index] = one.result([values[need] for need in one.needs])
                    self.hook.add_partial(kind, one.arguments, results[index])
                    self._progress_by(1)

        def servers_of(index: int) -> frozenset[ServerUsed]:
            return frozenset().union(*(served[need] for need in asked[index].needs))

        def done() -> Iterator[Given]:
            return ((kind, asked[index], servers_of(index)) for index, count in enumerate(missing) if not count)

        with self._shown(kind, len(asked), is_quiet), self._told_what_is_kept(done, len(asked)):
            while True:
                with closing(stream(left)) as answers:
                    for answer in answers:
                        take(answer)
                self.model.blocks.settle(on_tick=self.tick)
                left = [handle for handle, by in served.items() if self._is_caught(by)]
                if not left:
                    break
                self._forget(done())
                for handle in left:
                    del served[handle]
                    for index in waiting[handle]:
                        self._progress_by(-1 if not missing[index] else 0)
                        missing[index] += 1
        self._note(done())
        self.check_recalled()
        return results

    def check_recalled(self) -> None:
        """Raise SwarmError where the harness was given answers before by servers that were caught since."""
        if self._recalled:
            raise SwarmError(
                f"{len(self._recalled):,} answers that the harness was given before are by servers that were caught "
                f"since ({listed(map(short_peer, sorted(self._caught)))}), and its numbers would hold them. Run it "
                "again: with --use_cache FILE nothing else is computed anew."
            )

    def tick(self) -> None:
        """Look after the swarm, a few times a second: what it says, and who was caught."""
        status = self.model.blocks.status()
        for notice in status.notices:
            if notice not in self._said:
                self.say(notice)
        if self._progress is not None:
            self._progress.set_postfix_str(
                f"waiting for the swarm: {status.waiting}" if status.waiting else "", refresh=False
            )
        caught = frozenset(each.server.peer_id for each in status.findings if not each.is_used)
        if caught - self._caught:
            self._caught |= caught
            self._recalled |= self._forget(self.given)

    def say(self, line: str) -> None:
        """Show a person a line, once."""
        self._said.add(line)
        with tqdm.external_write_mode():
            _log.warning(line)

    def _note(self, given: Iterable[Given]) -> None:
        for each in given:
            kind, _, servers = each
            self.given.append(each)
            self.requests[kind] += 1
            self.servers.update(servers)

    def _is_caught(self, servers: Collection[ServerUsed]) -> bool:
        return any(server.peer_id in self._caught for server in servers)

    def _forget(self, given: Iterable[Given]) -> set[str]:
        """Take out of the harness's cache what servers computed that were caught; returns its keys of that."""
        keys = {hash_args(kind, asked.arguments) for kind, asked, servers in given if self._is_caught(servers)}
        cache = self.hook.dbdict
        for key in () if cache is None else [key for key in keys if key in cache]:
            del cache[key]
        return keys

    @contextmanager
    def _told_what_is_kept(self, done: Callable[[], Iterable[Any]], total: int) -> Iterator[None]:
        """Whatever ends a call early, leave no answer in the cache of a server that was caught; say what is kept."""
        try:
            yield
        except (PetalsEvalError, KeyboardInterrupt) as error:
            self.tick()
            self._forget(done())
            kept = [given for given in done() if not self._is_caught(given[2])]
            self._note(kept)
            if isinstance(error, SwarmError):
                is_kept = (
                    "are kept in its cache: run it again to go on"
                    if self.hook.dbdict is not None
                    else ("are lost: with --use_cache FILE they would be kept")
                )
                error.add_note(f"  The answers to {len(kept):,} of {total:,} requests of the harness {is_kept}.")
            raise

    @contextmanager
    def _shown(self, kind: str, total: int, is_quiet: bool) -> Iterator[None]:
        with tqdm(total=total, desc=f"{kind} over the swarm", disable=is_quiet) as self._progress:
            try:
                yield
            finally:
                self._progress = None

    def _progress_by(self, count: int) -> None:
        if self._progress is not None and count:
            self._progress.update(count)

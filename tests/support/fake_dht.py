"""A DHT node that holds what a test puts there."""

import asyncio
import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

Answer = Mapping[int, Mapping[str, tuple[int, float]]]
"""What one look finds: by block and peer the state and the expiration of a record of blocks 0:2."""


class FakeDHT:
    """answers: what each look finds, one after the other; None: it does not answer."""

    def __init__(self, *answers: Answer | None):
        self.answers = list(answers)
        self.looks = 0

    async def get_many(
        self, uids: Iterable[str], expiration: float, num_workers: int, return_futures: bool
    ) -> dict[str, asyncio.Future]:
        assert expiration == math.inf and return_futures
        self.looks += 1
        answer = self.answers.pop(0) if self.answers else {}
        if answer is None:
            return {uid: asyncio.get_running_loop().create_future() for uid in uids}
        return found({uid: self._entry(answer.get(int(uid.rpartition(".")[2]))) for uid in uids})

    @staticmethod
    def _entry(records: Mapping[str, tuple[int, float]] | None) -> SimpleNamespace | None:
        if records is None:
            return None
        span = {"start_block": 0, "end_block": 2}
        found = {
            peer: SimpleNamespace(value=(state, 1.0, span), expiration_time=until)
            for peer, (state, until) in records.items()
        }
        return SimpleNamespace(value=found)


class FilledDHT:
    """A DHT that holds one value under every key."""

    def __init__(self, value: object):
        self.value = value

    async def get_many(self, uids: Iterable[str], *_: object, **__: object) -> dict[str, asyncio.Future]:
        return found({uid: SimpleNamespace(value=self.value, expiration_time=100) for uid in uids})


def found(entries: Mapping[str, object]) -> dict[str, asyncio.Future]:
    """The searches of a DHT node that are over: each found what is given here."""
    searches = {key: asyncio.get_running_loop().create_future() for key in entries}
    for key, entry in entries.items():
        searches[key].set_result(entry)
    return searches

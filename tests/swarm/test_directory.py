"""The directory between two looks: records hold until they expire, and a DHT that is silent is waited for briefly."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from petals_eval.swarm.directory import dht as module
from petals_eval.swarm.directory.dht import Directory
from tests.swarm.fakes import settings

PEERS = ("QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY", "QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5")
ONLINE, OFFLINE = 2, 0


class FakeDHT:
    """answers: what each look finds, one after the other, as {block: {peer: (state, expiration)}}; None: no answer."""

    def __init__(self, *answers):
        self.answers = list(answers)

    @staticmethod
    def of(value):
        """A DHT that holds this under every block."""
        dht = FakeDHT()

        async def get_many(uids, expiration, num_workers):
            return {uid: SimpleNamespace(value=value, expiration_time=100) for uid in uids}

        dht.get_many = get_many
        return dht

    async def get_many(self, uids, expiration, num_workers):
        assert expiration == math.inf
        answer = self.answers.pop(0)
        if answer is None:
            await asyncio.sleep(60)
        span = {"start_block": 0, "end_block": 2}
        return {
            uid: None
            if int(uid.rpartition(".")[2]) not in answer
            else SimpleNamespace(
                value={
                    peer: SimpleNamespace(value=(state, 1.0, span), expiration_time=until)
                    for peer, (state, until) in answer[int(uid.rpartition(".")[2])].items()
                }
            )
            for uid in uids
        }


def seen(monkeypatch, times, *answers):
    """The servers of the snapshot after each look, the clock at `times`."""
    clock = iter(times)
    monkeypatch.setattr(module, "get_dht_time", lambda: next(clock))
    monkeypatch.setattr(module, "LOOK_TIMEOUT", 0.05)

    async def look():
        directory = Directory(FakeDHT(*answers), "tiny", 2, settings())
        return [set((await directory.refresh()).servers) for _ in times]

    return asyncio.run(look())


def both(first, second):
    return {block: {PEERS[0]: first, PEERS[1]: second} for block in (0, 1)}


@pytest.mark.parametrize("silence", [None, {}])
def test_a_record_holds_until_it_expires_when_the_dht_has_lost_it(monkeypatch, silence):
    found = seen(monkeypatch, [0, 50, 150, 250], both((ONLINE, 100), (ONLINE, 200)), silence, silence, silence)
    assert found == [set(PEERS), set(PEERS), {PEERS[1]}, set()]


def test_a_newer_record_takes_the_place_of_an_older_one(monkeypatch):
    found = seen(
        monkeypatch,
        [0, 1, 2],
        both((ONLINE, 100), (ONLINE, 200)),
        both((OFFLINE, 110), (ONLINE, 200)),
        both((ONLINE, 100), (ONLINE, 200)),  # an old copy that another DHT node still had
    )
    assert found == [set(PEERS), {PEERS[1]}, {PEERS[1]}]


@pytest.mark.parametrize("value", ["text", {"not a peer": 1}, {PEERS[0]: 1}, {PEERS[0]: {"state": 2}}, {1: None}])
def test_a_plain_value_in_the_place_of_records_is_dropped_and_counted(value):
    snapshot = asyncio.run(Directory(FakeDHT.of(value), "tiny", 2, settings()).refresh())
    assert (snapshot.servers, snapshot.dropped) == ({}, 2)


def test_a_directory_that_nobody_uses_asks_nothing_and_looks_first_when_it_is_used_again():
    looks = 0

    async def get_many(uids, expiration, num_workers):
        nonlocal looks
        looks += 1
        return {}

    async def live() -> None:
        nonlocal looks
        dht = FakeDHT()
        dht.get_many = get_many
        directory = Directory(dht, "tiny", 2, settings(update_period=0.05))
        await directory.refresh()
        keeping = asyncio.create_task(directory.keep_fresh())
        while looks < 4:
            await directory.use()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # what was still in use
        looks = 0
        await asyncio.sleep(0.5)
        assert looks == 0
        await directory.use()
        assert looks == 1, "what it knew is old"
        await directory.use()
        assert looks == 1
        keeping.cancel()

    asyncio.run(asyncio.wait_for(live(), 10))


def test_a_look_that_raises_does_not_end_keeping_fresh():
    """hivemind decodes what strangers stored inside its own search; the next look may find better."""

    async def keep() -> set[str]:
        dht = FakeDHT({0: {PEERS[0]: (ONLINE, 4e9)}})
        well, looks = dht.get_many, 0

        async def get_many(uids, expiration, num_workers):
            nonlocal looks
            looks += 1
            if looks == 1:
                raise AttributeError("'bytes' object has no attribute 'items'")
            return await well(uids, expiration, num_workers) if looks == 2 else {}

        dht.get_many = get_many
        directory = Directory(dht, "tiny", 2, settings(update_period=0.02))
        keeping = asyncio.create_task(directory.keep_fresh())
        while looks < 3:
            await directory.use()
            await asyncio.sleep(0.01)
        keeping.cancel()
        return set(directory.snapshot.servers)

    assert asyncio.run(asyncio.wait_for(keep(), 10)) == {PEERS[0]}

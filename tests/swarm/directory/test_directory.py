"""The directory between two looks: records hold until they expire, and a DHT that is silent is waited for briefly."""

import asyncio

import pytest

from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.directory import dht as module
from petals_eval.swarm.directory.dht import DhtSource
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook
from tests.support.fake_dht import FakeDHT
from tests.support.fake_swarm import settings

PEERS = ("QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY", "QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5")
ONLINE, OFFLINE = 2, 0


def seen(monkeypatch, times, *answers):
    """The servers of the snapshot after each look, the clock at `times`."""
    clock = iter(times)
    monkeypatch.setattr(module, "get_dht_time", lambda: next(clock))
    monkeypatch.setattr(module, "_LOOK_TIMEOUT", 0.05)

    async def look():
        directory = Directory(DhtSource(FakeDHT(*answers)), "tiny", 2, PeerBook(settings()))
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


def test_a_directory_that_nobody_uses_asks_nothing_and_looks_first_when_it_is_used_again():
    async def live(runtime) -> None:
        dht = FakeDHT()
        directory = Directory(DhtSource(dht), "tiny", 2, PeerBook(settings(update_period=0.05), runtime))
        await directory.refresh()
        keeping = asyncio.create_task(directory.keep_fresh())
        while dht.looks < 4:
            await directory.use()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # what was still in use
        dht.looks = 0
        await asyncio.sleep(0.5)
        assert dht.looks == 0
        await directory.use()
        assert dht.looks == 1, "what it knew is old"
        await directory.use()
        assert dht.looks == 1
        keeping.cancel()

    _, seconds = run_in_virtual_time(live)
    assert seconds < 10


def test_a_look_that_raises_does_not_end_keeping_fresh():
    """hivemind decodes what strangers stored inside its own search; the next look may find better."""

    class Raising(FakeDHT):
        async def get_many(self, uids, *rest, **options):
            if self.looks == 0:
                self.looks += 1
                raise AttributeError("'bytes' object has no attribute 'items'")
            return await super().get_many(uids, *rest, **options)

    async def keep(runtime) -> set[str]:
        dht = Raising({0: {PEERS[0]: (ONLINE, 4e9)}})
        directory = Directory(DhtSource(dht), "tiny", 2, PeerBook(settings(update_period=0.02), runtime))
        keeping = asyncio.create_task(directory.keep_fresh())
        while dht.looks < 3:
            await directory.use()
            await asyncio.sleep(0.01)
        keeping.cancel()
        return set(directory.snapshot.servers)

    servers, seconds = run_in_virtual_time(keep)
    assert servers == {PEERS[0]}
    assert seconds < 10

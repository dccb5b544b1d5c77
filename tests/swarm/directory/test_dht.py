"""What lies in the DHT, where strangers may have put anything."""

import asyncio
import time

import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from petals_eval.swarm.directory import dht as dht_module
from petals_eval.swarm.directory.dht import DhtSource, join_dht, look
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.transport.daemon import end_daemon, start_daemon
from tests.support.fake_dht import FilledDHT
from tests.support.fake_swarm import settings

PEER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


@pytest.mark.parametrize("value", ["text", {"not a peer": 1}, {PEER: 1}, {PEER: {"state": 2}}, {1: None}])
def test_a_plain_value_in_the_place_of_records_is_dropped_and_counted(value):
    snapshot = asyncio.run(Directory(DhtSource(FilledDHT(value)), "tiny", 2, PeerBook(settings())).refresh())
    assert (snapshot.servers, snapshot.dropped) == ({}, 2)


GARBAGE = [b"\xc1", b"", b"\x92\x01", b"\xc7\x00\x51", b"\xd9\x01\xff"]


def test_values_that_cannot_be_decoded_cost_no_time_and_no_other_key():
    """hivemind decodes in its search, which would never end for such a key, nor for the keys asked for after it."""
    good = MSGPackSerializer.dumps((2, 1.0, {}))

    async def looked_up():
        until = get_dht_time() + 100
        node = await DHTNode.create()
        for number, garbage in enumerate(GARBAGE):
            node.protocol.storage.store(DHTID.generate(f"plain.{number}"), garbage, until)
            among = DictionaryDHTValue()
            among.store(PEER, good, until)
            among.store("garbage", garbage, until)
            node.protocol.storage.store(DHTID.generate(f"m.{number}"), among, until)
        keys = [f"{kind}.{number}" for kind in ("plain", "m", "nothing") for number in range(len(GARBAGE))]
        p2p = await start_daemon(
            initial_peers=list(map(str, await node.get_visible_maddrs())),
            dht_mode="client",
            no_listen=True,
            host_maddrs=None,
        )
        try:
            joined = await join_dht(p2p, list(map(str, await node.get_visible_maddrs())))
            begun = time.monotonic()
            found = await look(joined, keys)
            took = time.monotonic() - begun
            await joined.shutdown()
        finally:
            await end_daemon(p2p, 5)
            await node.shutdown()
        return found, took

    found, took = asyncio.run(looked_up())
    assert took < 15
    for number in range(len(GARBAGE)):
        assert found[f"plain.{number}"].value is None and found[f"nothing.{number}"] is None
        among = found[f"m.{number}"].value
        assert among[PEER].value == (2, 1.0, {}) and among["garbage"].value is None


def test_what_was_found_in_time_is_kept(monkeypatch):
    monkeypatch.setattr(dht_module, "_LOOK_TIMEOUT", 0.05)

    class Slow:
        async def get_many(self, keys, *_, **__):
            self.searches = {key: asyncio.get_running_loop().create_future() for key in keys}
            self.searches["a"].set_result(1)
            return self.searches

    async def looked_up():
        slow = Slow()
        found = await look(slow, ["a", "b"])
        return found, slow.searches["b"].cancelled()

    assert asyncio.run(looked_up()) == ({"a": 1}, True)
    assert asyncio.run(look(Slow(), [])) == {}

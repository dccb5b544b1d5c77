"""What lies in the DHT, where strangers may have put anything."""

import asyncio

import pytest

from petals_eval.swarm.directory.dht import DhtSource
from petals_eval.swarm.directory.directory import Directory
from petals_eval.swarm.peers.peer import PeerBook
from tests.support.fake_dht import FilledDHT
from tests.support.fake_swarm import settings

PEER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


@pytest.mark.parametrize("value", ["text", {"not a peer": 1}, {PEER: 1}, {PEER: {"state": 2}}, {1: None}])
def test_a_plain_value_in_the_place_of_records_is_dropped_and_counted(value):
    snapshot = asyncio.run(Directory(DhtSource(FilledDHT(value)), "tiny", 2, PeerBook(settings())).refresh())
    assert (snapshot.servers, snapshot.dropped) == ({}, 2)

"""Bootstrap peers as people hand them over: one text, several in one text, or a list of them."""

import pytest

from petals_eval import RemoteModel, check_health
from petals_eval.config import RunSettings, SwarmSettings, checked_peers
from petals_eval.errors import ConfigError
from petals_eval.health.settings import HealthSettings

ONE, TWO = (f"/ip4/10.0.0.{index}/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY" for index in (1, 2))


@pytest.mark.parametrize("kind", [SwarmSettings, HealthSettings, RunSettings])
@pytest.mark.parametrize("given", [f"{ONE} {TWO}", [ONE, TWO], (f"{ONE}  {TWO}",), f" {ONE}\n{TWO} "])
def test_two_addresses_are_two_however_they_are_written(kind, given):
    more = {"model": "m", "task": "t", "dht_prefix": "p"} if kind is RunSettings else {}
    assert kind(initial_peers=given, **more).initial_peers == (ONE, TWO)


ID = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


@pytest.mark.parametrize(
    ("address", "stands_for"),
    [
        (f"drift://{ID}@203.0.113.10:31337", f"/ip4/203.0.113.10/tcp/31337/p2p/{ID}"),
        (f"DRIFT://{ID}@[2001:db8::1]:31337", f"/ip6/2001:db8::1/tcp/31337/p2p/{ID}"),
        (f"drift://{ID}@peer.example.org:31337", f"/dns/peer.example.org/tcp/31337/p2p/{ID}"),
    ],
)
def test_an_address_of_drift_is_taken_for_the_multiaddress_it_stands_for(address, stands_for):
    for kind in (SwarmSettings, HealthSettings):
        assert kind(initial_peers=(address, ONE)).initial_peers == (stands_for, ONE)
    assert checked_peers([f"{address} {TWO}"]) == (stands_for, TWO)


@pytest.mark.parametrize(
    "address",
    [f"drift://{ID}@203.0.113.10", f"drift://{ID}@:1", "drift://nobody@203.0.113.10:1", f"drift://{ID}@::1:1"],
)
def test_an_address_of_drift_that_lacks_something_is_refused_in_words(address):
    with pytest.raises(
        ConfigError, match=r"expected a multiaddress such as .* or drift://12D3KooW...@203.0.113.5:31337"
    ):
        SwarmSettings(initial_peers=(address,))


@pytest.mark.parametrize("call", [check_health, lambda peers: RemoteModel.from_pretrained("m", initial_peers=peers)])
@pytest.mark.parametrize(("given", "says"), [("nonsense", "expected a multiaddress"), (" ", "initial_peers")])
def test_a_text_that_is_no_address_is_named_as_one(call, given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        call(given)
    assert str(caught.value).count("initial_peers") == 1, "letter by letter"

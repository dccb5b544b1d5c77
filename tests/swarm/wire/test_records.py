"""Records are claims of strangers: validated, or dropped and counted."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_eval.errors import ConfigError
from petals_eval.swarm.wire.records import Announcement, ServerFilter, ServerRecord, ServerState, read_snapshot
from petals_eval.swarm.wire.span import Span
from tests.support.fake_swarm import settings

FULL = {
    "start_block": 0,
    "end_block": 3,
    "public_name": "me",
    "version": "2.2.0",
    "network_rps": 10.0,
    "forward_rps": 10,
    "inference_rps": 5.0,
    "adapters": ["some/lora"],
    "torch_dtype": "float32",
    "quant_type": "none",
    "using_relay": False,
    "cache_tokens_left": 8192,
    "next_pings": {"Qm": 0.1},
    "from_a_newer_version": object,
}


def announce(block: int, peer: str, value: object, expiration: float = 1.0) -> Announcement:
    return Announcement(block, peer, value, expiration)


def test_a_full_record_is_read_and_unknown_keys_are_ignored():
    record = ServerRecord.from_wire((2, 10.5, FULL))
    assert (record.state, record.throughput, record.end_block) == (ServerState.ONLINE, 10.5, 3)
    assert record.adapters == ("some/lora",)


def test_pings_are_read_one_by_one_and_not_without_end():
    pings = {
        "Qm": 0.25,
        "lost": math.inf,
        "zero": 0,
        "nan": math.nan,
        "less": -1.0,
        "words": "0.1",
        "yes": True,
        7: 0.1,
    }
    evil = {"\x1b[31m": 0.1, "a b": 0.1, "<b>": 0.1, "": 0.1, "x" * 81: 0.1}
    record = ServerRecord.from_wire((2, 1.0, {"next_pings": pings | evil}))
    assert record.next_pings == (("Qm", 0.25), ("lost", None), ("zero", 0.0))
    many = ServerRecord.from_wire((2, 1.0, {"next_pings": {f"Qm{each}": 0.1 for each in range(10_000)}}))
    assert len(many.next_pings) == 128
    assert ServerRecord.from_wire((2, 1.0, {})).next_pings is None


@pytest.mark.parametrize("pings", [{"Qm": float("inf")}, {"Qm": float("nan")}, {}, None, "none"])
def test_a_server_is_used_whatever_became_of_its_pings(pings):
    """A Petals server that could not reach the next one announces infinity. Seen under load: both were well."""
    snapshot = read_snapshot([announce(0, "a", (2, 1.0, FULL | {"next_pings": pings}))], 3)
    assert (list(snapshot.servers), snapshot.dropped) == (["a"], 0)


def test_the_words_of_a_stranger_are_safe_to_show_and_short():
    """They stand in warnings and errors on a terminal, in the journal and in the manifest."""
    words = "2.2.0\x1b]0;owned\x07\u202e\n" + "x" * 10_000
    record = ServerRecord.from_wire((2, 1.0, {"version": words, "quant_type": words, "torch_dtype": words}))
    for shown in (record.version, record.quant_type, record.torch_dtype):
        assert shown.startswith("2.2.0\ufffd]0;owned")
        assert shown.isprintable()
        assert len(shown) == 80


def test_extra_is_optional():
    assert ServerRecord.from_wire((1, 0.0)).state is ServerState.JOINING


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        (2,),
        (7, 1.0, {}),
        (2, -1.0, {}),
        (2, float("nan"), {}),
        (2, 1.0, {"start_block": -1}),
        (2, 1.0, {"start_block": "0"}),
        (2, 1.0, {"adapters": "text"}),
        (2, 1.0, {"version": 5}),
        (2, 1.0, {1: 2}),
        (2, 1.0, []),
    ],
)
def test_malformed_records_are_refused(value):
    with pytest.raises(ValueError):
        ServerRecord.from_wire(value)
    snapshot = read_snapshot([announce(0, "a", value)], 3)
    assert (snapshot.servers, snapshot.dropped) == ({}, 1)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    )
)
def test_nothing_a_stranger_stores_raises_anything_else(value):
    read_snapshot([announce(0, "a", value), announce(0, "b", (2, 1.0, value)), announce(0, "c", [2, value, {}])], 3)


def test_only_online_servers_that_are_chosen_count():
    announcements = [
        announce(0, "offline", (0, 1.0, FULL)),
        announce(0, "joining", (1, 1.0, FULL)),
        announce(0, "online", (2, 1.0, FULL)),
        announce(0, "plain", (2, 1.0, {**FULL, "adapters": []})),
    ]
    assert set(read_snapshot(announcements, 3).servers) == {"online", "plain"}
    chosen = read_snapshot(announcements, 3, ServerFilter(active_adapter="some/lora"))
    assert set(chosen.servers) == {"online"}
    assert chosen.left_out["plain"][1] == "does not announce adapter some/lora"


@pytest.mark.parametrize(
    ("choice", "used", "reason"),
    [
        (ServerFilter(dtype="float32"), {"a", "b"}, "computes in bfloat16, not float32"),
        (ServerFilter(quant="none"), {"a"}, "quantises with nf4, not none"),
        (ServerFilter(allow=("a", "...c")), {"a", "c"}, "is not among the allowed servers"),
        (ServerFilter(deny=("b",)), {"a", "c", "silent"}, "is denied"),
        (ServerFilter(dtype="bfloat16", quant="none"), set(), "computes in unknown, not bfloat16"),
    ],
)
def test_whom_to_use(choice, used, reason):
    announcements = [
        announce(0, "a", (2, 1.0, FULL)),
        announce(0, "b", (2, 1.0, {**FULL, "quant_type": "nf4"})),
        announce(0, "c", (2, 1.0, {**FULL, "torch_dtype": "bfloat16", "quant_type": "int8"})),
        announce(0, "silent", (2, 1.0, {"start_block": 0, "end_block": 3})),
    ]
    snapshot = read_snapshot(announcements, 3, choice)
    assert set(snapshot.servers) == used
    assert set(snapshot.left_out) == {"a", "b", "c", "silent"} - used
    assert reason in {each for _, each in snapshot.left_out.values()}


@pytest.mark.parametrize("name", ["", "...", " "])
@pytest.mark.parametrize("setting", ["allow_servers", "deny_servers"])
def test_an_empty_identity_is_refused_for_it_would_be_everybodys(setting, name):
    with pytest.raises(ConfigError, match="expected a server's identity or its last letters"):
        settings(**{setting: ("12D3KooWAlpha", name)})


def test_a_server_that_moved_counts_where_its_newest_record_says():
    old = {"start_block": 0, "end_block": 2}
    new = {"start_block": 4, "end_block": 6}
    snapshot = read_snapshot(
        [
            announce(0, "a", (2, 1.0, old), 10.0),
            announce(1, "a", (2, 1.0, old), 10.0),
            announce(4, "a", (2, 1.0, new), 20.0),
        ],
        6,
    )
    assert snapshot.servers["a"].span == Span(4, 6)
    assert snapshot.missing() == (Span(0, 4),)


def test_without_a_span_the_keys_count():
    snapshot = read_snapshot([announce(block, "a", (2, 1.0)) for block in (1, 2)], 4)
    assert snapshot.servers["a"].span == Span(1, 3)
    assert snapshot.missing() == (Span(0, 1), Span(3, 4))
    assert snapshot.missing(without=frozenset({"a"})) == (Span(0, 4),)


def test_a_span_outside_the_model_is_cut_or_dropped():
    long = {"start_block": 2, "end_block": 10**18}
    beyond = {"start_block": 9, "end_block": 12}
    snapshot = read_snapshot([announce(2, "a", (2, 1.0, long)), announce(2, "b", (2, 1.0, beyond))], 4)
    assert snapshot.servers["a"].span == Span(2, 4)
    assert snapshot.dropped == 1


def test_the_newest_record_that_can_be_read_counts():
    good, bad = {"start_block": 0, "end_block": 2}, {"start_block": "0"}
    announcements = [
        announce(0, "a", (2, 1.0, good), 10.0),
        announce(1, "a", (2, 1.0, bad), 20.0),
        announce(2, "a", (0, 1.0, good), 5.0),
        announce(0, "b", (2, 1.0, bad), 10.0),
    ]
    snapshot = read_snapshot(announcements, 3)
    assert snapshot.servers["a"].span == Span(0, 2)
    assert (set(snapshot.servers), snapshot.dropped) == ({"a"}, 2)

"""What a swarm announces that does not announce the name a model was looked for under: shown at once, never used."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from petals_eval.config import CallSettings
from petals_eval.errors import MissingBlocksError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.dht_prefixes import default_prefix
from petals_eval.remote_model import LocalSide
from petals_eval.swarm import connection as connection_module
from petals_eval.swarm.directory.announced import (
    AnnouncedModel,
    IndexPolicy,
    announced_models,
    models_text,
    not_announced,
)
from tests.support.fake_dht import found
from tests.support.real_swarm import connect
from tests.support.tiny_models import make_tiny

BLOCKS = 2
OF_A_RELATIVE = "bigscience/bloom-drift"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=BLOCKS)


@pytest.fixture(scope="module")
def swarm(folder):
    """One model as Petals' servers announce it, one as DRIFT's, one in an index of its own, and a private one."""
    names = {"of-petals": "_petals.models", "of-drift": "_drift.models", OF_A_RELATIVE: "_others.models"}
    with LocalSwarm(folder, servers=1, dht_prefix="_private", mode="thread") as first:
        peers, running = first.initial_peers, []
        for name, key in names.items():
            options = {"dht_prefix": name, "index_key": key, "initial_peers": peers, "mode": "thread"}
            running.append(LocalSwarm(folder, servers=1, **options).start())
        yield first
        for each in running:
            each.stop()


def refusal(swarm, prefix, **settings):
    """What is said of a name that nobody announces, and that it is said at once."""
    with connect(swarm, **settings) as connection:
        started = time.monotonic()
        with pytest.raises(MissingBlocksError) as caught:
            connection.remote_sequential(prefix, BLOCKS)
        assert time.monotonic() - started < 30  # the deadline is ten minutes
    assert caught.value.missing == ((0, BLOCKS),) and caught.value.exit_code == 3
    return str(caught.value)


def test_the_indexes_of_all_relatives_are_read(swarm):
    said = refusal(swarm, "wrong")
    assert said.startswith("nobody announces 'wrong' on this swarm; announced here: of-drift (2 blocks), of-petals (2 ")
    assert OF_A_RELATIVE not in said and "_private" not in said and "--dht-prefix" in said
    assert f"{OF_A_RELATIVE} (2 blocks)" in refusal(swarm, "wrong", index_keys=("_others.models",))


def test_an_index_that_has_the_name_itself_is_no_other_name_to_give_and_cuts_no_wait_short(swarm, monkeypatch):
    """The index has answered, and the look at the blocks has not yet; or a stranger has put the name there."""

    async def listed(*arguments):
        return [AnnouncedModel(name, BLOCKS, None) for name in ("slow", "another")]

    monkeypatch.setattr(connection_module, "announced_elsewhere", listed)
    started = time.monotonic()
    assert "announced here: another (2 blocks). Give" in refusal(swarm, "slow", connect_timeout=1)
    assert time.monotonic() - started > 1


def test_names_by_the_rules_of_relatives_come_first_be_they_in_an_index_or_not(swarm):
    local = SimpleNamespace(
        family=SimpleNamespace(model_type="bloom"), fingerprint={"model": "bigscience/bloom"}, num_blocks=BLOCKS
    )
    side = LocalSide(local, (), CallSettings(), default_prefix("bloom", "bigscience/bloom"))
    with connect(swarm) as connection, pytest.raises(MissingBlocksError) as caught:
        side.blocks_on(connection)
    assert (
        "'bigscience/bloom-petals' on this swarm; announced here: bigscience/bloom-drift (blocks up to 2), of-"
        in str(caught.value)
    )


def test_a_name_that_is_announced_in_part_is_waited_for_and_without_any_index_nothing_else_is_known(folder):
    with LocalSwarm(folder, spans=[(0, 1)], dht_prefix="_private", mode="thread") as swarm:
        assert "announced here: nothing: are its servers up?" in refusal(swarm, "wrong", connect_timeout=0.1)
        with connect(swarm, deadline=0.5) as connection:
            assert len(connection.remote_sequential("_private", BLOCKS, ("others",))) == BLOCKS


def test_a_name_is_found_though_the_first_look_did_not_find_it(folder):
    """A DHT that is slow to answer, and servers that announce themselves a moment later."""
    with (
        LocalSwarm(folder, spans=[(0, 1)], dht_prefix="_other", mode="thread") as swarm,
        connect(swarm, connect_timeout=60) as connection,
    ):
        joins = {"dht_prefix": "_late", "initial_peers": swarm.initial_peers, "mode": "thread"}
        late = LocalSwarm(folder, servers=1, **joins)
        starting = threading.Timer(0.5, late.start)
        starting.start()
        try:
            assert connection.remote_sequential("_late", BLOCKS).dht_prefix == "_late"
        finally:
            starting.join()
            late.stop()


def test_of_two_indexes_the_larger_number_of_blocks_counts():
    """A swarm is not healthy for its smaller half because a stranger says that this is all there is."""

    class Indexes:
        async def get_many(self, keys, *_, **__):
            entries = [{"tiny": {"num_blocks": count}, "bad": {"num_blocks": "2"}} for count in (2, 5)]
            held = [{name: SimpleNamespace(value=value) for name, value in each.items()} for each in entries]
            return found({key: SimpleNamespace(value=each) for key, each in zip(keys, held, strict=True)})

    assert asyncio.run(announced_models(Indexes())) == ([AnnouncedModel("tiny", 5, None)], 2)


def test_a_stranger_can_neither_flood_nor_forge_the_message():
    models = [AnnouncedModel(f"\x1b[31mred\n{number}", 1, None) for number in range(500)]
    said = not_announced("wrong", models)
    assert said.isprintable() and len(said) < 2000
    assert models_text(models).endswith(f" and {500 - IndexPolicy.max_shown} more")

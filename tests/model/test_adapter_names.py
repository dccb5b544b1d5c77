"""What adapters are called: as they are told to be, or by the part of their path that tells them apart."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError
from petals_eval.evaluation.prepare import side_of_run
from petals_eval.model.prompts import named_adapters
from petals_eval.remote_model import load_local
from tests.support.tiny_models import make_tiny


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def names(*places: str) -> list[str]:
    for place in places:
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir(exist_ok=True)
    found = named_adapters(places)
    assert [place for _, place in found] == list(places)
    for other in permutations(found):  # whatever their order
        assert named_adapters([place for _, place in other]) == list(other)
    return [name for name, _ in found]


@pytest.mark.parametrize(
    ("places", "expected"),
    (
        (("runs/a", "runs/b"), ["a", "b"]),
        (("e1/prompts.pt", "e2/prompts.pt"), ["e1", "e2"]),
        (("a/epoch-1/adapter", "b/epoch-1/adapter"), ["a", "b"]),
        (("a/epoch-1/adapter", "a/epoch-2/adapter", "final"), ["epoch-1", "epoch-2", "final"]),
        (("lr-1/e1/p.pt", "lr-2/e1/p.pt", "lr-1/e2/p.pt"), ["lr-1-e1", "lr-2-e1", "lr-1-e2"]),
        (("x/adapter", "adapter"), ["x", "HERE"]),
        (("one/adapter", "two/adapter.pt"), ["adapter", "adapter.pt"]),
        (("a/b/c/adapter/", "./a/d/c/adapter"), ["b", "d"]),
    ),
)
def test_the_nearest_part_that_differs(places, expected):
    assert names(*places) == [Path.cwd().name if name == "HERE" else name for name in expected]


def test_one_place_twice_is_one_name_twice():
    Path("a").mkdir()
    Path("b").symlink_to("a")
    assert [name for name, _ in named_adapters(["a", "./a", "b"])] == ["a"] * 3


def settings(adapter: object) -> RunSettings:
    return RunSettings(model="m", task="t", local_swarm=1, adapter=adapter)


def test_names_that_are_given():
    """On the command line, in a file, and from Python."""
    Path("lr=0.1").mkdir()
    Path("runs/lr=0.2").mkdir(parents=True)
    assert settings(["first=./a", "second=x=./b"]).adapter == (("first", "./a"), ("second", "x=./b"))
    assert settings({"epoch 1": Path("a"), "epoch 2": "owner/b"}).adapter == (("epoch 1", "a"), ("epoch 2", "owner/b"))
    assert settings([("one", Path("a")), Path("b")]).adapter == (("one", "a"), "b")
    # A path that is there is a path; so is one with its sign behind a slash.
    written = ("lr=0.1", "runs/lr=0.2", "runs/lr=0.3")
    assert settings(written).adapter == written
    assert named_adapters(settings(["mine=lr=0.1", "lr=0.1"]).adapter) == [("mine", "lr=0.1"), ("lr=0.1", "lr=0.1")]


@pytest.mark.parametrize(
    ("adapter", "message"),
    (
        ("=a", r"adapter\.0: expected a name of 1 to 100 characters that is no path, in NAME=PATH"),
        ({"a/b": "c"}, r"adapter\.0: expected a name"),
        ("a" * 101 + "=b", r"adapter\.0: expected a name of 1 to 100"),
        ({"~": "c"}, r"adapter\.0: expected a name"),
        ([3], r"adapter\.0: expected a path, a hub name, or NAME=PATH \(found 3\)"),
        ({"a": None}, r"adapter\.0: expected a path, a hub name, or NAME=PATH"),
    ),
)
def test_what_is_no_name_or_no_place(adapter, message):
    with pytest.raises(ConfigError, match=message):
        settings(adapter)


def test_two_of_one_name_are_refused_before_anything_is_read():
    names("a/adapter", "b/adapter")
    Path("m").mkdir()
    for adapter in (["a/adapter", "a/adapter"], ["x=a/adapter", "x=b/adapter"]):
        with pytest.raises(
            ConfigError, match=r"found '(adapter|x)' 2 times\. Give one a name of its own: --adapter NAME="
        ):
            side_of_run(settings(adapter))


def test_adapters_have_these_names(tmp_path):
    model = str(make_tiny("llama", tmp_path / "model", hidden=16))
    for folder in ("e1", "e2"):
        Path(folder).mkdir()
        torch.save({"model.prompt_embeddings.weight": torch.ones(2, 16)}, f"{folder}/prompts.pt")
    _, adapters = load_local(model, ["e1/prompts.pt", ("last", "e2/prompts.pt"), "e2/prompts.pt"])
    assert [adapter.name for adapter in adapters] == ["e1", "last", "e2"]
    with pytest.raises(ConfigError, match="--adapter-task 1: expected an adapter that has prompts for several tasks"):
        load_local(model, "e1/prompts.pt", adapter_task=1)

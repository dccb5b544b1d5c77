"""Arguments of the public functions of a wrong type: each has an error of ours that says what was expected."""

from pathlib import Path

import pytest
import torch

import petals_eval
from petals_eval.config import RunSettings
from petals_eval.data import DataSource
from petals_eval.errors import PetalsEvalError
from petals_eval.local_swarm import LocalSwarm
from tests.fake_model import ROWS, TASK, FakeModel
from tests.support.fake_swarm import PEER
from tests.support.tiny_models import make_tiny

RECORDS = [{"text": "fine", "label": "good"}] * ROWS


def refused(function, *arguments, **options) -> str:
    with pytest.raises(PetalsEvalError) as caught:
        function(*arguments, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": 7}, "expected the name of a task, the path of a YAML file, a mapping .* found int"),
        ({"task": None}, "expected the name of a task, .* found NoneType"),
        ({"task": ["sst2"]}, "expected the name of a task, .* found list"),
        ({"data": 7}, "expected a list of mappings, a pandas DataFrame or a datasets.Dataset, found int"),
        ({"data": b"rows.csv"}, "expected a list of mappings, .* found bytes"),
        ({"data": [1]}, "rows in memory, row 0: expected a mapping"),
        ({"data": {"text": ["a"]}}, "rows in memory: expected rows, found one mapping"),
        ({"limit": "many"}, "limit: expected a whole number .found 'many'"),
        ({"limit": [5]}, "limit: expected a whole number"),
        ({"limit": 0}, "limit should be at least 1, found 0"),
        ({"seed": None}, "seed: expected a whole number .found None"),
        ({"seed": -1}, "seed should be 0 or more"),
        ({"shard": 2}, "shard: expected text .found 2"),
        ({"unlabelled": "ignore"}, "unlabelled: expected 'error' or 'predict'"),
        ({"without_prompts": "perhaps"}, "without_prompts: expected true or false"),
        ({"out": 7}, "out: expected text .found 7"),
        ({"save_texts": "perhaps"}, "save_texts: expected true or false"),
        ({"shots_data": 7}, "shots_data: expected text .found 7"),
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch: expected more than 0"),
        ({"tokens_per_micro_batch": "big"}, "tokens_per_micro_batch: expected a whole number"),
        ({"progress": print}, "progress: expected True, or an object with the methods update"),
        ({"tokenizer": object()}, "a RemoteModel has a tokenizer of its own"),
    ],
)
def test_of_evaluate(changes, said):
    import re

    message = refused(petals_eval.evaluate, FakeModel(), **({"task": TASK, "data": RECORDS} | changes))
    assert re.search(said, message), message


@pytest.mark.parametrize("model", [None, "bigscience/bloom", torch.nn.Linear(1, 1), 7])
def test_of_evaluate_the_model(model):
    said = "expected a petals_eval.RemoteModel or a Petals model with a head"
    assert said in refused(petals_eval.evaluate, model, task=TASK, data=RECORDS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": 7}, "model: expected text (found 7)"),
        ({"model": None}, "model: expected text (found None)"),
        ({"adapter": 7}, "adapter: expected a list (found 7)"),
        ({"adapter": [7]}, "adapter.0: expected a path, a hub name, or NAME=PATH (found 7)"),
        ({"initial_peers": 7}, "initial_peers: "),
        ({"initial_peers": ["here"]}, "expected a multiaddress"),
        ({"dht_prefix": 7}, "dht_prefix: expected text (found 7)"),
        ({"revision": 7}, "revision: expected text (found 7)"),
        ({"token": 7}, "token: expected text"),
        (
            {"dtype": "float12"},
            "dtype: expected a dtype of floating point, such as float32 or bfloat16, found 'float12'",
        ),
        ({"dtype": "int64"}, "dtype: expected a dtype of floating point"),
        (
            {"dtype": torch.int8},
            "dtype: expected a dtype of floating point, such as float32 or bfloat16, found torch.int8",
        ),
        ({"dtype": 32}, "dtype: expected a dtype of floating point"),
        ({"device": 0}, "device: expected text (found 0)"),
        ({"device": "abacus"}, "device: expected one that torch can use here, found 'abacus'"),
        ({"cache_dir": 7}, "cache_dir: expected text (found 7)"),
        ({"pool": "first"}, "pool: expected 'auto'"),
        ({"verify_local": "first"}, "verify_local: expected blocks FIRST:LAST"),
        ({"deadline": "soon"}, "deadline: expected a number"),
        ({"allow_servers": 7}, "allow_servers: expected a list"),
        ({"windows": 7}, "unknown setting 'windows'"),
    ],
)
def test_of_from_pretrained(changes, said, tmp_path):
    given = {"model": make_tiny("llama", tmp_path / "tiny"), "initial_peers": PEER, "dht_prefix": "tiny", **changes}
    message = refused(petals_eval.RemoteModel.from_pretrained, given.pop("model"), **given)
    assert said in message
    assert "7" not in message or "token" not in changes  # a token is never shown


@pytest.mark.parametrize(
    ("parts", "out", "said"),
    [
        ("runs/a", "out", "expected a list of run folders to merge, found str"),
        (7, "out", "expected a list of run folders to merge, found int"),
        ([7], "out", "expected paths of run folders, found int"),
        (["a"], None, "expected paths of run folders, found NoneType"),
        ([], "out", "expected the run folders of the parts to merge; found none"),
    ],
)
def test_of_merge(parts, out, said):
    assert said in refused(petals_eval.merge, parts, out=out)


def test_a_path_will_do_wherever_there_is_one(tmp_path):
    """Model, adapter, cache, task, data and folder; and a dtype by its name."""
    folder = make_tiny("llama", tmp_path / "tiny", labels=2)
    task = tmp_path / "task.yaml"
    task.write_text('text: "{text}"\nlabel_column: label\nlabel_names: [bad, good]\nmetrics: [accuracy]\n')
    data = tmp_path / "rows.csv"
    data.write_text("text,label\nis it good,good\nno,bad\n")
    adapter = tmp_path / "prompts.pt"
    torch.save({"model.prompt_embeddings.weight": torch.zeros(2, 32)}, adapter)
    with (
        LocalSwarm(folder, servers=1, mode="thread", dht_prefix="tiny", cache_dir=tmp_path / "cache") as swarm,
        petals_eval.RemoteModel.from_pretrained(
            folder,
            adapter=adapter,
            initial_peers=swarm.initial_peers,
            dht_prefix="tiny",
            cache_dir=tmp_path / "cache",
            dtype="float32",
            device=torch.device("cpu"),
        ) as model,
    ):
        result = petals_eval.evaluate(model, task=task, data=data, out=tmp_path / "run")
        again = petals_eval.evaluate(model, task=task, data=DataSource(path=data))
    assert result.metrics == again.metrics and (tmp_path / "run" / "metrics.json").is_file()
    assert list(result.adapters) == ["prompts.pt"] and model.local.dtype == torch.float32
    settings = {"model": folder, "adapter": adapter, "task": task, "data": data, "out": Path("run"), "local_swarm": 1}
    assert RunSettings(**settings) == RunSettings(
        **{**settings, **{k: str(v) for k, v in settings.items() if k != "local_swarm"}}
    )


def test_whether_it_says_how_far_it_is_and_what_a_notebook_shows(capsys):
    """Somebody in a notebook types `progress=True`, and leaves the result as the last line of a cell."""
    result = petals_eval.evaluate(FakeModel(), task=TASK, data=RECORDS, progress=True)
    said = capsys.readouterr()
    assert f"{len(RECORDS)}/{len(RECORDS)}" in said.err and said.out == ""
    petals_eval.evaluate(FakeModel(), task=TASK, data=RECORDS, progress=False)
    assert capsys.readouterr().err == ""
    assert result._repr_markdown_() == result.to_markdown() and "| accuracy |" in result._repr_markdown_()

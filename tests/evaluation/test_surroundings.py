"""An evaluation gives the same numbers, to the bit, whatever the program around it has set torch to."""

import json
from contextlib import nullcontext

import pytest

import petals_eval
from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm.wire.codecs import blockwise_codebook
from tests.model.test_arithmetic import SURROUNDINGS

PREFIX = "stories260K-hf"
LIMIT = 40
WORDS = """
text: "Question: {{text}}\\nType:"
label_column: coarse_label
label_names: [description, entity, abbreviation, human, location, number]
label_words: [" word", " thing", " short", " man", " home", " two"]
max_length: 96
metrics: [accuracy, log_loss]
data: {{path: {data}, format: lines, encoding: latin-1, pattern: '(?P<coarse_label>\\d) (?P<text>.*)'}}
"""


@pytest.fixture(scope="module")
def swarm(realdata):
    with LocalSwarm(realdata / PREFIX, servers=2, dht_prefix=PREFIX) as swarm:
        yield swarm


@pytest.fixture
def tasks(realdata, tmp_path):
    """A trained head, and label words: what is evaluated, and with which data."""
    data = realdata / "trec" / "TREC.test.all"
    (tmp_path / "words.yaml").write_text(WORDS.format(data=data))
    return {"head": ("trec", data), "words": (tmp_path / "words.yaml", None)}


# All of them are tried on what stays at home (tests/model/test_arithmetic.py): here those that reach farther.
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("wire", "names"),
    (
        (None, ("autocast bfloat16", "default dtype float64", "default device", "matrix products of medium precision")),
        ("blockwise8", ("default dtype bfloat16",)),
        ("uniform8", ("default dtype float64",)),
    ),
)
def test_every_prediction_is_the_same_to_the_bit(wire, names, swarm, tasks, realdata, tmp_path):
    adapters = [str(realdata / "adapters" / name) for name in ("trec-deep_ptune", "trec-ptune")]
    found = {}
    for name in ("nothing", *names):
        surroundings = SURROUNDINGS.get(name, nullcontext)
        blockwise_codebook.cache_clear()  # made anew in these surroundings
        with (
            surroundings(),
            petals_eval.RemoteModel.from_pretrained(
                str(realdata / PREFIX),
                adapter=adapters,
                initial_peers=swarm.initial_peers,
                dht_prefix=PREFIX,
                wire=wire,
                verify_local=(0, 2) if wire is None else None,
            ) as model,
        ):
            for what, (task, data) in tasks.items():
                out = tmp_path / f"{name}-{what}"
                # Of one size: which one suits best is found out by the clock, and gives a row other last bits.
                petals_eval.evaluate(model, task=task, data=data, limit=LIMIT, out=out, tokens_per_micro_batch=1024)
                lines = {path.name: path.read_text() for path in out.glob("predictions*.jsonl")}
                assert len(lines) == len(adapters)
                found.setdefault(what, {})[name] = lines
                manifest = json.loads((out / "manifest.json").read_text())
                assert manifest["answer_settings"]["dtype"] == "float32"
    for by_name in found.values():
        for name, lines in by_name.items():
            assert lines == by_name["nothing"], name

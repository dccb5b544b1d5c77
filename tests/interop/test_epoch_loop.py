"""The loop of guides/epoch_loop.md: a real Petals client trains prompts on our stub, evaluated after each epoch."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.proto.runtime_pb2 import CompressionType

import petals_eval
from petals_eval.data import DataSource, load_rows
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model import load_adapter
from petals_eval.model.blocks import BlockSpan
from petals_eval.tasks import load_task, resolve_source
from tests.interop.conftest import STORIES
from tests.interop.petals_folders import petals_copy
from tests.interop.real_petals import run_petals_loop
from tests.interop.server_kinds import PETALS
from tests.interop.test_client_on_real_servers import reference_logits
from tests.interop.test_petals_client_on_our_stub import OnlyLocal
from tests.support.pages import Page
from tests.support.tensors import distance, hidden_states
from tests.support.wire_client import WireClient, chain

EPOCHS, TRAINED, EVALUATED = 3, 96, 60
SPANS = [(0, 2), (2, 4), (4, 5)]


def write_rows(realdata: Path, split: str, count: int, path: Path) -> list[dict[str, str]]:
    task = load_task("trec")
    rows = load_rows(resolve_source(task, realdata / "trec" / f"TREC.{split}.all"))
    found = [
        {"text": row.columns["text"], "label": task.label_names[int(row.columns["coarse_label"])]}
        for row, _ in zip(rows, range(count), strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["deep_ptune", "ptune"])
def test_the_loop_of_the_guide(mode, stories, stories_dir, realdata, tmp_path):
    folders = {name: tmp_path / name for name in ("stub", "real")}
    for folder in folders.values():
        petals_copy(stories_dir, folder / "my-llama")
        write_rows(realdata, "train", TRAINED, folder / "train.jsonl")
        rows = write_rows(realdata, "test", EVALUATED, folder / "test.jsonl")
    with LocalSwarm(stories_dir, spans=SPANS, dht_prefix=STORIES, mode="thread") as stub:
        swarms = {
            name: {"initial_peers": list(swarm.initial_peers), "dht_prefix": STORIES}
            for name, swarm in (("stub", stub), ("real", stories))
        }
        found = run_petals_loop(
            {
                "folder": str(tmp_path),
                "guide": Page("epoch_loop").blocks("python"),
                "swarms": swarms,
                "tuning_mode": mode,
                "trained_by_it": ["stub"],
            },
            tmp_path,
            script="epoch_loop_script.py",
            kind=PETALS,
        )
    ours, real = found["stub"], found["real"]
    assert ours["losses"] == pytest.approx(real["losses"], abs=1e-3)
    means = torch.tensor(ours["losses"]).view(EPOCHS, -1).mean(1).tolist()
    assert means == sorted(means, reverse=True) and means[-1] < 0.95 * means[0]

    model = OnlyLocal(stories_dir)
    labels = load_task("trec").label_names
    task = petals_eval.ClassificationTask(
        name="questions", text="{text}", label_column="label", label_names=labels, max_length=40
    )
    evaluated = load_rows(DataSource(path=str(folders["stub"] / "test.jsonl")))
    requests = [request for example in task.examples(evaluated, model.local.tokenizer) for request in example.requests]
    for epoch, metrics in enumerate(ours["metrics"], start=1):
        saved = folders["stub"] / "runs" / f"epoch-{epoch}" / "prompts.pt"
        adapter = load_adapter(str(saved), family=model.local.family, config=model.local.config)
        logits = reference_logits(model, stories_dir, adapter, requests).values()
        right = sum(labels[int(each.argmax())] == row["label"] for each, row in zip(logits, rows, strict=True))
        assert metrics["accuracy"] == right / EVALUATED
    assert (folders["stub"] / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    compared = petals_eval.compare(*sorted((folders["stub"] / "runs").glob("epoch-*")))
    assert "epoch-1" in str(compared)

    logged = [line for line in ours["logged"] if "questions/accuracy" in line]
    assert [line["epoch"] for line in logged] == [1, 2, 3]
    assert all(line["questions/accuracy_low"] < line["questions/accuracy"] for line in logged)
    assert (folders["stub"] / "runs" / "trainer" / "epoch-3" / "metrics.json").exists()


@pytest.mark.parametrize("method", ["backward", "backward_stream"])
def test_gradients_are_those_of_a_real_server(method, stories, stories_dir):
    span = BlockSpan.load(stories_dir, *SPANS[0])
    hidden, upwards = hidden_states(3, 9, span.hidden_size), hidden_states(3, 9, span.hidden_size, seed=1)
    prompts = torch.randn(2, 1, 4, span.hidden_size)
    server, uid = stories.servers[0].peer_id, chain(STORIES, *SPANS[0])
    with WireClient(stories.initial_peers) as client:
        backward = getattr(client, method)
        for one, right in zip(
            backward(server, uid, hidden, upwards, prompts), span.backward(hidden, upwards, prompts), strict=True
        ):
            assert distance(one, right) < 1e-4
        (alone,) = backward(server, uid, hidden, upwards)
        assert distance(alone, *span.backward(hidden, upwards)) < 1e-4
        codes = (int(CompressionType.FLOAT16),) * 2
        assert len(backward(server, uid, hidden, upwards, prompts, output_compression=codes)) == 2
        for wrong in ({"prompts": prompts[:1]}, {"output_compression": codes}):
            found = ()
            with contextlib.suppress(P2PHandlerError):  # a stream may have ended before its error is there
                found = backward(server, uid, hidden, upwards, **wrong)
            assert len(found) == 0

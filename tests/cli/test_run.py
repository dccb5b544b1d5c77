"""`petals-eval run`: the reference scores, and what is printed and written."""

import json
import re
from pathlib import Path

import pytest
import yaml

from petals_eval.local_swarm import LocalSwarm
from petals_eval.swarm.scheduling import push_scheduler
from petals_eval.swarm.transport.libp2p import Libp2pTransport
from petals_eval.text import PLAIN_WIDTH
from tests.cli.conftest import Stage
from tests.cli.invoking import invoke

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWFMGVy1SpFwiww5ojbVfr1VQijdk7qfYaVG1m1EKLsZPd"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_three_adapters_side_by_side_with_the_reference_scores(stage: Stage) -> None:
    names = ["trec-deep_ptune", "trec-ptune", "trec-ptune-peft"]
    several = ["--adapter", *(stage.adapter(name) for name in names)]
    outcome = invoke(*stage.run("--out", "runs/three", *several, adapter=None))
    assert outcome.code == 0
    found = read_json(Path("runs/three/metrics.json"))
    values = {name: found["adapters"][name]["metrics"]["accuracy"]["value"] for name in names}
    assert values == {"trec-deep_ptune": 0.7360, "trec-ptune": 0.7180, "trec-ptune-peft": 0.7180}

    head, accuracy, *_ = outcome.out.splitlines()
    assert head.split()[:3] == names
    assert re.findall(r"\b0\.\d{4}", accuracy)[:3] == ["0.7360", "0.7180", "0.7180"]
    assert "+0.0180" in outcome.out  # the differences of the first from each other one
    assert "majority baseline: always answering 'description'" in outcome.out
    assert outcome.out.endswith("run folder: runs/three\nreport: runs/three/report.html\n")
    assert max(map(len, outcome.out.splitlines())) <= PLAIN_WIDTH
    assert "prompts: trec-deep_ptune (deep_ptune, 8 tokens x 5 blocks); trec-ptune (ptune, 16 tokens);" in outcome.err
    assert "1,500/1,500" in outcome.err
    assert {path.name for path in Path("runs/three").iterdir()} == {
        "manifest.json",
        "journal.sqlite",
        "metrics.json",
        "report.html",
        "report.md",
        *(f"predictions.{name}.jsonl" for name in names),
    }


def test_adapters_are_told_apart_by_name_and_by_task(stage: Stage) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    whole = AutoModelForSequenceClassification.from_pretrained(stage.model, num_labels=6)
    settings = peft.MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4, num_tasks=2)
    for folder in ("a", "b"):
        peft.get_peft_model(whole, settings).save_pretrained(f"{folder}/prompts")
    command = stage.run("--limit", 5, "--out", "r", "--adapter-task", 1, adapter=None)
    outcome = invoke(*command, "--adapter", "a/prompts", "b/prompts", f"mine={stage.adapter()}")
    assert outcome.code == 0
    assert set(read_json(Path("r/metrics.json"))["adapters"]) == {"a", "b", "mine"}
    assert "prompts: a (peft-multitask_prompt_tuning, task 1, 4 tokens); b (" in outcome.err
    assert read_json(Path("r/manifest.json"))["answer_settings"]["adapter_task"] == 1
    outcome = invoke(*stage.run("--adapter-task", 1))
    assert outcome.code == 2 and "--adapter-task 1: expected an adapter that has prompts for several" in outcome.err


def test_one_adapter_on_sst2_and_the_files_of_its_folder(stage: Stage) -> None:
    data = stage.realdata / "sst2"
    data = next(path for path in sorted(data.iterdir()) if "dev" in path.name)
    command = [*stage.on_task("sst2", data), "--adapter", stage.adapter("sst2-deep_ptune"), *stage.swarm]
    outcome = invoke(*command, "--out", "sst2")
    assert outcome.code == 0
    metrics = read_json(Path("sst2/metrics.json"))
    assert metrics["metrics"]["accuracy"]["value"] == pytest.approx(501 / 872, abs=1e-12)
    assert f"{501 / 872:.4f}" == "0.5745"
    assert "0.5745" in outcome.out.splitlines()[1]
    assert metrics["schema_version"] == 2
    assert metrics["n_examples"] == 872
    assert metrics["n_failed"] == 0
    assert metrics["seconds"] > 0
    assert metrics["examples_per_second"] > 0
    assert metrics["tokens_per_second"] > 0
    low, high = metrics["metrics"]["accuracy"]["ci95"]
    assert low < 0.5745 < high

    lines = read_lines(Path("sst2/predictions.jsonl"))
    assert [line["key"] for line in lines] == [str(index) for index in range(872)]
    assert list(lines[0]) == [
        *("schema_version", "kind", "key", "row_hash", "label", "prediction", "probabilities"),
        *("n_requests", "n_tokens"),
    ]
    assert sum(line["label"] == line["prediction"] for line in lines) == 501
    assert all(sum(line["probabilities"]) == pytest.approx(1) for line in lines)

    text = Path("sst2/manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert manifest["schema_version"] == 2
    assert manifest["finished"]
    assert manifest["model"]["name"] == "stories260K-hf"
    assert manifest["adapters"][0]["name"] == "sst2-deep_ptune"
    assert {(server["first"], server["end"]) for server in manifest["servers"]} == {(0, 2), (2, 4), (4, 5)}
    assert str(stage.realdata) not in text


def test_json_prints_the_metrics_file_and_nothing_else(stage: Stage) -> None:
    outcome = invoke(*stage.run("--out", "r", "--json", "--limit", 40))
    assert outcome.code == 0
    assert outcome.out == Path("r/metrics.json").read_text(encoding="utf-8")
    assert json.loads(outcome.out)["n_examples"] == 40
    assert "run folder: r" in outcome.err


def test_the_prompts_are_worth_something(stage: Stage) -> None:
    outcome = invoke(*stage.run("--out", "r", "--without-prompts", "--limit", 100))
    assert outcome.code == 0
    assert "without the prompts: accuracy 0." in outcome.out
    found = read_json(Path("r/metrics.json"))
    assert found["without_prompts"]["metrics"]["accuracy"]["value"] < found["metrics"]["accuracy"]["value"]
    assert Path("r/predictions.jsonl").exists()
    assert Path("r/predictions.without-the-prompts.jsonl").exists()


def test_a_limit_draws_by_the_seed(stage: Stage) -> None:
    keys = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert invoke(*stage.run("--out", name, "--limit", 25, "--seed", seed)).code == 0
        keys[name] = [line["key"] for line in read_lines(Path(name, "predictions.jsonl"))]
    assert keys["a"] == keys["b"] != keys["c"]
    assert len(set(keys["a"])) == 25
    assert read_json(Path("a/metrics.json"))["metrics"] == read_json(Path("b/metrics.json"))["metrics"]


def test_a_file_says_what_flags_say_and_flags_win(stage: Stage) -> None:
    settings = {
        "model": str(stage.model),
        "adapter": str(stage.adapter()),
        "task": "trec",
        "data": str(stage.trec),
        "initial-peers": stage.peer,
        "dht_prefix": "stories260K-hf",
        "limit": 30,
        "seed": 3,
        "out": "from-file",
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert invoke("run", "--config", "run.yaml").code == 0
    assert invoke(*stage.run("--limit", 30, "--seed", 3, "--out", "from-flags")).code == 0
    assert read_lines(Path("from-file/predictions.jsonl")) == read_lines(Path("from-flags/predictions.jsonl"))
    assert invoke("run", "--config", "run.yaml", "--limit", 20, "--out", "overridden").code == 0
    assert len(read_lines(Path("overridden/predictions.jsonl"))) == 20


def test_max_length_cuts_the_texts_and_says_so(stage: Stage) -> None:
    outcome = invoke(*stage.run("--max-length", 12, "--limit", 20, "--out", "r"))
    assert outcome.code == 0
    assert max(line["n_tokens"] for line in read_lines(Path("r/predictions.jsonl"))) == 12
    assert read_json(Path("r/metrics.json"))["n_truncated"] > 10
    assert "truncated" in outcome.out


def test_the_default_folder_is_new_each_time(stage: Stage) -> None:
    for _ in range(2):
        outcome = invoke(*stage.run("--limit", 5))
        assert outcome.code == 0
        folder = Path(outcome.out.splitlines()[-2].removeprefix("run folder: "))
        assert folder.parent == Path("runs") and folder.name.startswith("trec-20")
    assert len(list(Path("runs").iterdir())) == 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every call of a block, at the only place where the client makes one."""
    made: list[object] = []
    real = Libp2pTransport.call

    def call(self: Libp2pTransport, hop: object, *rest: object, **how: object) -> object:
        made.append(hop)
        return real(self, hop, *rest, **how)

    monkeypatch.setattr(Libp2pTransport, "call", call)
    return made


def test_a_dry_run_shows_everything_and_sends_nothing(stage: Stage, calls: list[object]) -> None:
    outcome = invoke(*stage.run("--dry-run", "--limit", 3))
    assert outcome.code == 0
    assert calls == []
    assert not Path("runs").exists()
    lines = outcome.out.splitlines()
    assert lines[0] == "== trec-deep_ptune: the first examples as the model reads them"
    assert any(line.startswith("example ") and "text tokens" in line for line in lines)
    assert "  positions 0-7: prompt" in lines
    assert any(line.startswith("  positions 8-") for line in lines)
    assert any(line.startswith("  the head reads position ") for line in lines)
    assert any(line.startswith("would send 3 examples as 3 requests in 1 micro-batch") for line in lines)
    assert "of hidden states to each hop and as much back, and 10.2 kB of deep prompts over all hops" in outcome.out
    assert "== the servers that would be used first" in lines
    assert [line.split()[1] for line in lines if line.startswith("  blocks ")] == ["0:2", "2:4", "4:5"]
    assert lines[-1] == "nothing was sent"
    # The counter counts: a real run is seen by it.
    assert invoke(*stage.run("--limit", 3)).code == 0
    assert len(calls) >= 3


def test_a_lossy_wire_is_used_by_name_only_and_said(stage: Stage) -> None:
    command = stage.run("--limit", 60, "--out", "r")
    lossless = invoke(*stage.run("--limit", 60, "--out", "lossless"))
    assert "wire" not in lossless.out and "wire" not in read_json(Path("lossless/metrics.json"))
    assert read_json(Path("lossless/manifest.json"))["answer_settings"]["wire"] is None
    outcome = invoke(*command, "--wire", "blockwise8")
    assert outcome.code == 0
    (said,) = [line.strip() for line in outcome.out.splitlines() if "wire" in line]
    found = re.fullmatch(
        r"wire blockwise8: moved the answers to 16 examples by up to ([\d.e-]+), ([\d.e-]+) on average; "
        r"(\d+) predictions? changed",
        said,
    )
    assert found is not None
    record = read_json(Path("r/metrics.json"))["wire"]
    assert record["name"] == "blockwise8" and record["lossless"] == [] and len(record["taken_by"]) == 3
    assert 0 < record["sample"]["mean"] < record["sample"]["largest"] < 3
    assert float(found[1]) == pytest.approx(record["sample"]["largest"], rel=0.1)
    manifest = read_json(Path("r/manifest.json"))
    assert manifest["answer_settings"]["wire"] == "blockwise8"
    assert manifest["wire"] == record
    report = Path("r/report.md").read_text()
    assert "## Lossy wire: blockwise8" in report and report.count("took it") == 3
    scores = [
        [line["probabilities"] for line in read_lines(Path(folder, "predictions.jsonl"))]
        for folder in ("r", "lossless")
    ]
    assert scores[0] != scores[1]


def test_an_unfinished_run_does_not_go_on_over_another_wire_and_is_sampled_once(stage: Stage) -> None:
    command = stage.run("--limit", 60, "--out", "r")
    assert invoke(*command, "--wire", "float16").code == 0
    manifest = read_json(Path("r/manifest.json"))
    manifest["finished"] = None  # as if it had been killed just before its end
    manifest["wire"]["sample"]["largest"] = 0.125
    manifest["wire"]["lossless"] = [{"peer_id": "12D3KooWGone", "reason": "it was old"}]
    for others in ([], ["--wire", "uniform8"]):
        Path("r/manifest.json").write_text(json.dumps(manifest))
        refused = invoke(*command, *others)
        assert refused.code == 2
        assert f"setting.wire: was float16, now {others[-1] if others else 'nothing'}" in refused.error
    outcome = invoke(*command, "--wire", "float16")
    assert outcome.code == 0
    assert "by up to 0.12," in outcome.out
    assert "lossless to and from 1 server, which did not take it: it was old" in outcome.out


def test_a_server_that_does_not_take_the_wire_is_named_and_used(stage: Stage) -> None:
    with LocalSwarm(stage.model, servers=1, mode="thread", has_bitsandbytes=False) as swarm:
        command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--limit", 20]
        where = ["--initial-peers", swarm.initial_peers[0], "--dht-prefix", swarm.dht_prefix]
        outcome = invoke(*command, *where, "--wire", "blockwise8", "--out", "r")
        (server,) = swarm.servers
    assert outcome.code == 0
    assert f"note: server ...{server.peer_id[-6:]} does not take --wire blockwise8" in outcome.error
    assert "lossless to and from 1 server, which did not take it:" in outcome.out and "bitsandbytes" in outcome.out
    assert read_json(Path("r/metrics.json"))["wire"]["sample"]["largest"] < 1e-4


def test_a_wrong_wire_is_named(stage: Stage) -> None:
    outcome = invoke(*stage.run("--wire", "uniform4"))
    assert outcome.code == 2
    assert "wire" in outcome.error and "'float16', 'blockwise8' or 'uniform8'" in outcome.error


def test_a_dry_run_counts_the_bytes_of_the_wire(stage: Stage) -> None:
    sizes = []
    for more in ([], ["--wire", "float16"], ["--wire", "blockwise8"]):
        outcome = invoke(*stage.run("--dry-run", "--limit", 3, *more))
        sizes.append(float(re.search(r"([\d.]+) kB of hidden states to each hop", outcome.out)[1]))
    assert sizes == [pytest.approx(sizes[0] / share, abs=0.1) for share in (1, 2, 4)]


def test_a_dry_run_is_a_gate(stage: Stage) -> None:
    """Without a swarm it shows all the rest, and its exit code says that a run could not begin."""
    command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--limit", 3, "--dry-run"]
    outcome = invoke(*command, "--initial-peers", NOBODY, "--dht-prefix", "x")
    assert outcome.code == 3
    assert "the swarm could not be asked:" in outcome.out
    assert "no initial peer answered" in outcome.out
    assert outcome.out.endswith("nothing was sent\n")
    outcome = invoke(*command, "--initial-peers", stage.peer, "--dht-prefix", "x")
    assert outcome.code == 3 and "  nobody announces 'x' on this swarm" in outcome.out
    found = json.loads(invoke(*command, "--initial-peers", stage.peer, "--dht-prefix", "x", "--json").out)
    assert (found["is_reachable"], found["missing_blocks"]) == (True, [[0, 5]])
    outcome = invoke(*command, *stage.swarm, "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["is_reachable"], found["missing_blocks"]) == (0, True, [])
    assert len(found["servers"]) == 4
    outcome = invoke(*command, "--local-swarm", 2)
    assert outcome.code == 0
    assert "  blocks 0:3  a server embedded on this machine" in outcome.out


def test_several_addresses_after_one_flag_or_in_one_variable(stage: Stage) -> None:
    rest = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--limit", 5]
    prefix = ["--dht-prefix", "stories260K-hf"]
    assert invoke(*rest, "--initial-peers", NOBODY, stage.peer, *prefix, "--out", "a").code == 0
    assert invoke(*rest, "--initial-peers", f"{NOBODY} {stage.peer}", *prefix, "--out", "b").code == 0


def test_pushing_gives_the_reference_score(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    came_through = []
    push = push_scheduler.push

    async def counted(client, hops, activations, timeout):
        pushed = await push(client, hops, activations, timeout)
        came_through.append(len(pushed.answers) == len(hops) == 3)
        return pushed

    monkeypatch.setattr(push_scheduler, "push", counted)
    outcome = invoke(*stage.run("--out", "r", "--push", "always", adapter="trec-ptune"))
    assert outcome.code == 0
    assert read_json(Path("r/metrics.json"))["metrics"]["accuracy"]["value"] == 0.7180
    assert read_json(Path("r/manifest.json"))["run_settings"]["push"] == "always"
    assert any(came_through)
    outcome = invoke(*stage.run("--push", "sometimes"))
    assert outcome.code == 2 and "push" in outcome.err and "'always'" in outcome.err

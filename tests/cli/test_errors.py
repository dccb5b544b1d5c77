"""What goes wrong, through the command: the message, the exit code, no traceback, and nothing left behind."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import petals_eval.cli.evaluation
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.families import FAMILIES
from tests.cli.conftest import Stage
from tests.cli.invoking import Outcome, invoke
from tests.cli.test_run import NOBODY

PROMPTS, DEEP = "model.prompt_embeddings.weight", "model.intermediate_prompt_embeddings.weight"


def refused(outcome: Outcome, *expected: str, code: int = 2) -> None:
    """Ended with this code and said all of this; stdout is empty."""
    assert outcome.code == code
    for text in expected:
        assert text in outcome.error
    assert outcome.error.count("error: ") == 1
    assert outcome.out == ""


def adapter_of(tensors: Mapping[str, torch.Tensor], peft: dict | None = None) -> Path:
    folder = Path("adapter")
    folder.mkdir()
    if peft is None:
        save_file(dict(tensors), folder / "prompts.safetensors")
    else:
        (folder / "adapter_config.json").write_text(json.dumps(peft))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "peft", "expected"),
    [
        pytest.param(
            {"score.weight": torch.zeros(6, 64)},
            None,
            [
                "has no prompt embeddings for a Llama",
                f"expected {PROMPTS} (prefix tokens, 64)",
                f"{DEEP} (prefix tokens, 5 * 64)",
                "found score.weight (6, 64)",
            ],
            id="no prompts",
        ),
        pytest.param(
            {PROMPTS: torch.zeros(8, 32)},
            None,
            [f"{PROMPTS} has the wrong shape", "expected (prefix tokens, 64)", "found (8, 32)"],
            id="another width",
        ),
        pytest.param(
            {PROMPTS: torch.zeros(8, 64), DEEP: torch.zeros(8, 4 * 64)},
            None,
            [f"{DEEP} has the wrong shape", "expected (8, 5 * 64 = 320)", "found (8, 256)"],
            id="another number of blocks",
        ),
        pytest.param(
            {"base_model.model.model.layers.0.lora_A.default.weight": torch.zeros(8, 64)},
            None,
            ["This looks like a LoRA adapter: LoRA runs on the servers; name it with --active-adapter."],
            id="LoRA state dict",
        ),
        pytest.param(
            {"lora_A": torch.zeros(8, 64)},
            {"peft_type": "LORA"},
            ["is a LORA adapter; expected PROMPT_TUNING, P_TUNING", "name it with --active-adapter"],
            id="LoRA of PEFT",
        ),
        pytest.param(
            {"prompt_embeddings": torch.zeros(8, 640)},
            {"peft_type": "PREFIX_TUNING"},
            ["is a PREFIX_TUNING adapter", "past keys and values", "a Petals server cannot take"],
            id="prefix tuning",
        ),
        pytest.param(
            {PROMPTS: torch.zeros(4, 64)},
            None,
            ["there is no trained head", "expected score.weight (labels, 64)", "label words"],
            id="no head",
        ),
        pytest.param(
            {PROMPTS: torch.zeros(4, 64), "score.weight": torch.zeros(2, 64)},
            None,
            ["the head gives (2,) scores, but task trec has 6 labels"],
            id="another task's head",
        ),
    ],
)
def test_adapters_that_cannot_be_used(stage: Stage, tensors: dict, peft: dict | None, expected: list[str]) -> None:
    refused(invoke(*stage.run("--out", "r", adapter=adapter_of(tensors, peft))), *expected)
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "text,coarse_label\nwho,human\nwhat,7\n",
            ["data.csv, row 1 (line 3): the label in column coarse_label is '7'", "5 number"],
        ),
        ("text,coarse_label\n", ["data.csv is empty: expected at least one row"]),
        ("text,kind\nwho,human\n", ["data.csv has no column coarse_label", "Columns found: text, kind"]),
    ],
)
def test_data_that_cannot_be_used(stage: Stage, text: str, expected: list[str]) -> None:
    Path("data.csv").write_text(text)
    refused(invoke(*stage.run("--out", "r", data="data.csv")), *expected)
    # Nothing is left that would refuse the corrected file.
    assert not Path("r").exists()


def test_tasks_models_and_files_that_are_not_there(stage: Stage) -> None:
    refused(invoke(*stage.on_task("sst3", stage.trec), *stage.swarm), "there is no task sst3. Did you mean sst2?")
    refused(invoke(*stage.on_task("my.yaml", stage.trec), *stage.swarm), "there is no task file my.yaml")
    refused(invoke(*stage.run(data="no.csv")), "there is no file no.csv")
    refused(invoke(*stage.run("--adapter", "./no", adapter=None)), "no folder ./no, and that is not a hub name")
    rest = ["--task", "trec", "--data", stage.trec, *stage.swarm]
    refused(invoke("run", "--model", "./no", *rest), "no folder ./no, and that is not a hub name")
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    refused(invoke("run", "--model", "./gpt2", *rest), "model_type 'gpt2'; expected one of bloom, ", *FAMILIES)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "expected exactly one swarm: --initial-peers MADDR, --public-swarm, or --local-swarm N"),
        ([], "found none"),
        (["--public-swarm", "--local-swarm", "2"], "found --public-swarm and --local-swarm"),
        (["--initial-peers", "127.0.0.1:31337"], "expected a multiaddress such as /ip4/203.0.113.5/tcp/31337/p2p/"),
        (["--initial-peers", "/ip4/127.0.0.1/tcp/31337"], "found '/ip4/127.0.0.1/tcp/31337'"),
        (["--local-swarm", "9"], "expected 1 to 5 servers for 5 blocks, found 9"),
        (["--local-swarm", "0"], "local_swarm: expected more than 0 (found 0)"),
        (["--local-swarm", "2", "--deadline", "0"], "deadline: expected more than 0 (found 0.0)"),
        (["--local-swarm", "2", "--limit", "0"], "limit: expected more than 0 (found 0)"),
        (["--local-swarm", "2", "--dtype", "int8"], "dtype: expected 'float32', 'bfloat16' or 'float16'"),
        (["--local-swarm", "2", "--device", "gpu"], "device: expected one that torch can use here, found 'gpu'"),
        (["--initial-peers", NOBODY], "is a local folder", "give it with --dht-prefix")[:2],
    ],
)
def test_flags_that_cannot_be(stage: Stage, flags: list[str], expected: str) -> None:
    command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--token", "hf_secret"]
    outcome = invoke(*command, *flags)
    refused(outcome, expected)
    assert "hf_secret" not in outcome.err


def test_a_local_folder_needs_its_name_on_a_foreign_swarm(stage: Stage) -> None:
    outcome = invoke(*stage.on_task("trec", stage.trec), "--initial-peers", stage.peer)
    refused(outcome, "is a local folder", "give it with --dht-prefix")


def test_a_wrong_flag_is_said_with_the_usage() -> None:
    for flags, expected in ((["--modle", "x"], "No such option"), (["--limit", "many"], "'--limit'")):
        outcome = invoke("run", *flags)
        assert outcome.code == 2
        assert expected in outcome.err and "Usage: petals-eval run" in outcome.err
        assert "bug" not in outcome.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [m", ["--config run.yaml, line 1: not valid YAML: expected ',' or ']'"]),
        ("- model\n", ["--config run.yaml: expected lines of `flag: value`, found list"]),
        ("model: m\ntaks: trec\nlocal_swarm: 2\n", ["unknown setting 'taks'. Did you mean task?", "task is missing"]),
        ("model: m\ntask: trec\nlocal_swarm: some\n", ["local_swarm: expected a whole number", "found 'some'"]),
        ("model: m\ntask: trec\nlocal_swarm: 2\ntoken: [hf_secret]\n", ["token: expected text"]),
    ],
)
def test_a_config_file_that_cannot_be_used(text: str, expected: list[str]) -> None:
    Path("run.yaml").write_text(text)
    outcome = invoke("run", "--config", "run.yaml")
    refused(outcome, *expected)
    assert "hf_secret" not in outcome.err


def test_a_config_file_that_is_not_there() -> None:
    refused(invoke("run", "--config", "no.yaml"), "--config no.yaml: No such file or directory")


def test_a_swarm_that_does_not_answer(stage: Stage) -> None:
    command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--dht-prefix", "x", "--out", "r"]
    outcome = invoke(*command, "--initial-peers", NOBODY)
    refused(outcome, "no initial peer answered", NOBODY, code=3)
    assert not Path("r").exists()


def test_a_name_that_no_server_announces(stage: Stage) -> None:
    command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--initial-peers", stage.peer]
    started = time.monotonic()
    outcome = invoke(*command, "--dht-prefix", "llama", "--out", "r")
    refused(
        outcome,
        "nobody announces 'llama' on this swarm; announced here: stories260K-hf (5 blocks). Give the name",
        code=3,
    )
    assert "waiting" not in outcome.err and time.monotonic() - started < 60  # the deadline is ten minutes
    assert not Path("r").exists()


def test_blocks_that_nobody_holds_in_mid_run_and_a_resume_elsewhere(stage: Stage) -> None:
    """The only server of block 4 goes after the first answers: exit code 3, and what was scored counts later on."""
    with LocalSwarm(stage.model, spans=[(0, 4), (4, 5)], dht_prefix="stories260K-hf", mode="thread") as swarm:
        real = petals_eval.cli.evaluation.open_model
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(petals_eval.cli.evaluation, "open_model", _killing(real, swarm))
            command = [*stage.on_task("trec", stage.trec), "--adapter", stage.adapter(), "--out", "r"]
            command += ["--dht-prefix", "stories260K-hf", "--window", 1, "--tokens-per-micro-batch", 600]
            outcome = invoke(*command, "--initial-peers", swarm.initial_peers[0], "--deadline", 2)
    assert outcome.code == 3
    assert outcome.out == ""
    assert "blocks 4:5" in outcome.error
    assert "of 500 examples are scored and kept in r. Run the same command again to go on." in outcome.error
    outcome = invoke(*command, "--initial-peers", stage.peer)
    assert outcome.code == 0
    assert json.loads(Path("r/metrics.json").read_text())["metrics"]["accuracy"]["value"] == 0.7360


def _killing(open_model, swarm):
    """open_model, with the last server killed after the third answer."""
    import contextlib

    @contextlib.contextmanager
    def opened(*arguments):
        with open_model(*arguments) as model:
            compute = model.compute

            def counted(*arguments, **keywords):
                for count, answered in enumerate(compute(*arguments, **keywords)):
                    if count == 20:
                        swarm.servers[-1].kill()
                    yield answered

            model.compute = counted
            yield model

    return opened


def test_folders_that_cannot_be_used(stage: Stage) -> None:
    assert invoke(*stage.run("--limit", 5, "--out", "done")).code == 0
    finished = invoke(*stage.run("--limit", 6, "--out", "done"))
    refused(finished, "Expected the finished run in done to be this one; found another:", "--out")

    shutil.copytree("done", "unfinished")
    manifest = json.loads(Path("unfinished/manifest.json").read_text())
    Path("unfinished/manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    refused(invoke(*stage.run("--limit", 6, "--out", "unfinished")), "found another:", "data.limit: was 5, now 6")
    assert Path("unfinished/journal.sqlite").exists()

    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    refused(invoke(*stage.run("--out", "full")), "Expected full to be empty", "found thesis.tex", "--out")
    refused(invoke(*stage.run("--out", "full/thesis.tex")), "found a file")
    refused(invoke(*stage.run("--out", "/proc/runs/r")), "Expected to use /proc/runs/r", "--out", code=4)
    refused(invoke(*stage.run("--out", "full/thesis.tex/r")), "Not a directory", code=4)


def test_a_bug_of_ours_is_kept_in_a_file(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("petals_eval.evaluation.evaluate.evaluate_prepared", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = invoke(*stage.run())
    refused(outcome, "a bug in petals-eval (ZeroDivisionError: a mistake)", "traceback kept in", code=70)
    [kept] = tmp_path.glob("petals-eval-bug-*.txt")
    assert str(kept) in outcome.err
    assert "ZeroDivisionError: a mistake" in kept.read_text() and "Traceback" in kept.read_text()


@pytest.mark.parametrize(
    "error", [MemoryError("1 TB"), OSError(28, "No space left on device"), PermissionError(13, "no")]
)
def test_what_this_machine_cannot(stage: Stage, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr("petals_eval.evaluation.evaluate.evaluate_prepared", broken)
    refused(invoke(*stage.run()), f"this machine cannot: {type(error).__name__}", code=4)


def test_servers_of_the_command_swarm_that_cannot_be(stage: Stage) -> None:
    for flags, expected in (
        (["--span", "0-4"], "--span: expected FIRST:LAST such as 0:4, found 0-4"),
        (["--span", "0:40"], "expected spans within 0:5, the model's blocks, found 0:40"),
        (["--dtype", "int8"], "dtype: expected 'float32', 'bfloat16' or 'float16' (found 'int8')"),
        (["--servers", "9"], "expected 1 to 5 servers for 5 blocks, found 9"),
    ):
        refused(invoke("swarm", stage.model, *flags), expected)
    refused(invoke("swarm", "./no"), "no folder ./no, and that is not a hub name")


def test_a_flag_for_a_swarm_wins_over_the_file(stage: Stage) -> None:
    """Of another kind, too: the file's choice of a swarm is dropped whole."""
    Path("run.yaml").write_text(yaml.safe_dump({"model": str(stage.model), "task": "trec", "public_swarm": True}))
    outcome = invoke("run", "--config", "run.yaml", "--initial-peers", "nonsense")
    refused(outcome, "expected a multiaddress")

"""Every command of the README does what it says there.

They run inside this process, as they are typed, in a folder that holds what they name. What a test may not have is
stood in for, and nothing else:
- the hub: a cache folder with tiny models under the names the README uses, and a data set made here;
- the public swarm: servers of this process, announced under the name that Petals' rule gives the hub model;
- servers of `--local-swarm` and `petals-eval swarm` are threads of this process and not processes;
- set-up (scripts, pip, python -m venv) is not run again: the scripts must be there, and parse.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

import petals_eval
import petals_eval.local_swarm
from petals_eval.demo import demo_paths
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.dht_prefixes import default_prefix
from petals_eval.model.families import FAMILIES
from petals_eval.tasks import load_task
from tests.cli.invoking import Outcome, invoke
from tests.support.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"bigscience/bloom": "bloom", "meta-llama/Llama-2-70b-hf": "llama"}
SET_UP = ("scripts/demo.sh", "scripts/test.sh", "scripts/build_container.sh", "python3.11", ".venv/bin/pip", "docker")


@dataclass(frozen=True)
class Typed:
    """A command of the README, and the output shown below it."""

    words: tuple[str, ...]
    shown: tuple[str, ...]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def typed() -> list[Typed]:
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = part.rstrip("\n").split("\n")
            words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
            found.append(Typed(tuple(words), tuple(shown)))
    return found


OURS = [each for each in typed() if Path(each.words[0]).name == "petals-eval"]


def steady(text: str) -> str:
    """Without what differs from run to run: identities, ports, speeds, times."""
    text = re.sub(r"12D3KooW\w+", "ID", text)
    text = re.sub(r"/tcp/\d+", "/tcp/PORT", text)
    text = re.sub(r"[\d.,]+ (ex|tok)/s", r"N \1/s", text)
    text = re.sub(r"is below \S+ \(", "is below N (", text)
    return re.sub(r"\d{4}-\d\d-\d\d-\d{4}", "TIME", text)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, as huggingface_hub keeps it, with tiny models under the README's names."""
    cache = tmp_path_factory.mktemp("hub")
    for name, family in HUB.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        make_tiny(family, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return cache


@pytest.fixture(scope="module")
def public_swarm(hub: Path) -> Iterator[tuple[str, ...]]:
    """Servers of both models, as the public swarm would announce them."""
    peers: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, family in HUB.items():
            folder = hub / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
            prefix = default_prefix(family, name)
            swarm = stack.enter_context(LocalSwarm(folder, servers=2, dht_prefix=prefix, mode="thread"))
            peers += swarm.initial_peers
        yield tuple(peers)


@pytest.fixture
def surroundings(
    hub: Path, public_swarm: tuple[str, ...], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The folder a user of the README works in."""
    demo = demo_paths()
    shutil.copytree(demo.model, "my-llama")
    shutil.copytree(demo.prompts, "prompts")
    shutil.copytree(demo.prompts, "other-prompts")
    shutil.copy(demo.data, "reviews.jsonl")
    Path("questions.txt").write_bytes("5 How far is it ?\n3 Who is Chloé ?\n".encode("latin-1") * 60)
    _save(Path("question-prompts"), 64, 6)
    _save(Path("sst2-prompts"), 32, 2)
    for block in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)
        assert name is not None, "a YAML example begins with its file's name"
        Path(name[1]).write_text(block)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", _with_sst2(datasets.load_dataset))
    monkeypatch.setattr("petals_eval.cli.open_swarm.PUBLIC_SWARM", public_swarm)
    threaded = functools.partial(LocalSwarm, mode="thread")
    monkeypatch.setattr(petals_eval.local_swarm, "LocalSwarm", threaded)
    monkeypatch.setenv("COLUMNS", "110")
    yield


def _save(folder: Path, hidden: int, labels: int) -> None:
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeddings.weight": torch.randn(4, hidden, generator=random),
        "score.weight": torch.randn(labels, hidden, generator=random),
    }
    torch.save(tensors, folder / "prompts.pt")


def _with_sst2(load: Callable) -> Callable:
    """datasets.load_dataset, with SST-2's hub data set made here; local files go through it, too."""

    def load_dataset(path: str, *arguments: object, **settings: object) -> datasets.Dataset:
        if path != "nyu-mll/glue":
            return load(path, *arguments, **settings)
        assert (*arguments, settings["split"]) == ("sst2", "validation")
        labels = datasets.ClassLabel(names=["negative", "positive"])
        features = datasets.Features({"sentence": datasets.Value("string"), "label": labels})
        rows = {"sentence": [f"it is good {index}" for index in range(150)], "label": [0, 1] * 75}
        return datasets.Dataset.from_dict(rows, features=features)

    return load_dataset


def run_typed(words: tuple[str, ...]) -> Outcome:
    if words[1:2] != ("swarm",):
        return invoke(*words[1:])
    with pytest.MonkeyPatch.context() as patch:  # the user's Ctrl-C
        patch.setattr(LocalSwarm, "wait", _interrupted)
        return invoke(*words[1:])


def _interrupted(swarm: LocalSwarm) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("command", OURS, ids=[" ".join(each.words)[:60] for each in OURS])
def test_a_command_of_the_readme(command: Typed) -> None:
    words = command.words
    if words[1] == "merge":
        for part in OURS:
            if "--shard" in part.words:
                assert run_typed(part.words).code == 0
    if words[1] in ("show", "errors", "report"):
        run = ("run", "--model", "my-llama", "--adapter", "prompts", "--task", "reviews.yaml", "--limit", 20)
        assert invoke(*run, "--local-swarm", 1, "--out", words[2]).code == 0
    if words[1] == "compare":
        for folder in words[2:]:
            run = ("run", "--model", "my-llama", "--adapter", Path(folder).name, "--task", "reviews.yaml")
            assert invoke(*run, "--local-swarm", 1, "--out", folder).code == 0
    if "$PEERS" in words:
        with LocalSwarm("my-llama", servers=2, mode="thread") as swarm:
            at = words.index("$PEERS")
            outcome = invoke(*words[1:at], *swarm.initial_peers, *words[at + 1 :])
    else:
        outcome = run_typed(words)
    assert outcome.code == 0
    printed = steady(outcome.err + outcome.out).splitlines()
    for line in command.shown:
        assert steady(line) in printed
    if "--public-swarm" in words and "--dry-run" not in words:
        assert "strangers' machines see the activations of these examples" in outcome.err
    if "--dry-run" in words:
        assert outcome.out.endswith("nothing was sent\n")
        assert "2 servers hold these 3 blocks" in outcome.out
    if "--out" in words:
        assert Path(words[words.index("--out") + 1], "metrics.json").exists()
    if "--html" in words:
        assert "<!doctype html>" in Path("health.html").read_text()
        assert json.loads(outcome.out)["verdict"] == "healthy"
    elif "--json" in words:
        assert json.loads(outcome.out)["n_examples"] == 50  # the flag's limit, not the file's


def test_the_demo_prints_what_the_readme_shows_and_shows_what_prompts_are_worth() -> None:
    [demo] = [each for each in typed() if each.words == ("scripts/demo.sh",)]
    assert 'exec .venv/bin/petals-eval demo "$@"' in (ROOT / "scripts/demo.sh").read_text()
    outcome = invoke("demo")
    assert outcome.code == 0
    printed = steady(outcome.err + outcome.out).splitlines()
    assert [line for line in map(steady, demo.shown) if line not in printed] == []

    folder = Path(outcome.out.splitlines()[-2].removeprefix("run folder: "))
    assert outcome.out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    found = json.loads((folder / "metrics.json").read_text())
    expected = json.loads(demo_paths().expected.read_text())
    assert found["metrics"]["accuracy"]["value"] == expected["accuracy"]
    assert found["without_prompts"]["metrics"]["accuracy"]["value"] == expected["accuracy_without_prompts"]
    assert expected["accuracy"] > 0.9 and abs(expected["accuracy_without_prompts"] - 0.5) < 0.05


def test_set_up_commands_are_there() -> None:
    for each in typed():
        if each not in OURS:
            assert each.words[0] in SET_UP
        if each.words[0] == "docker":
            assert (ROOT / each.words[each.words.index("-f") + 1]).is_file()
        if each.words[0].startswith("scripts/"):
            assert os.access(ROOT / each.words[0], os.X_OK)
            subprocess.run(["bash", "-n", ROOT / each.words[0]], check=True)


@pytest.mark.usefixtures("surroundings")
def test_the_python_examples() -> None:
    # The last one needs Petals and a training loop: tests/interop/test_live_petals_model.py runs such a loop.
    *examples, _ = blocks("python")
    names: dict[str, Any] = {}
    with LocalSwarm("my-llama", servers=2, mode="thread") as swarm:
        names["peers"] = swarm.initial_peers
        for example in examples:
            exec(textwrap.dedent(example), names)
    accuracy = names["accuracy"]
    assert accuracy.value > 0.9 and accuracy.ci95[0] < accuracy.value
    metrics, result = names["metrics"], names["result"]
    assert metrics["n"] == len(result.predictions) == 400
    for ours, theirs in (("accuracy", "accuracy"), ("f1", "f1_macro")):
        assert metrics[ours] == pytest.approx(result.metrics[theirs].value)
    assert Path("runs/from-python/report.md").exists()


@pytest.mark.usefixtures("surroundings")
def test_the_readme_names_what_there_is() -> None:
    assert set(re.split(r",\s+", re.findall(r"lists the tasks that ship: ([^.]*)\.", README)[0])) == {
        task.name for task in petals_eval.tasks.list_tasks()
    }
    assert all(family.title in README for family in FAMILIES.values())
    for name in ("reviews.yaml", "questions.yaml", "words.yaml", "alike.yaml"):
        assert load_task(name).name == Path(name).stem
    commands = (
        "",
        "run",
        "show",
        "compare",
        "errors",
        "tasks",
        "health",
        "swarm",
        "bootstrap",
        "bench forward",
        "bench inference",
        "bench simulate",
    )
    shown = "".join(invoke(*command.split(), "--help").out for command in commands)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {
        "--help",
        "--version",
        "--servers",
        "--config-settings",
        "--index-url",
    }
    assert [flag for flag in sorted(flags) if flag not in shown] == []
    for name in petals_eval.metrics.METRICS:
        stem = re.sub(r"_(macro|micro|weighted|per_class)$", "", name)
        assert stem.replace("majority_baseline", "majority baseline") in README

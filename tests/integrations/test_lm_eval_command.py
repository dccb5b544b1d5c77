"""`petals-eval lm-eval`: the commands of the harness's own README, with our model in place and local task files.

They are taken from the README as it is installed, in the description of the package. What a test may not have is stood
in for: the hub by a cache folder with tiny models under the README's names, its data sets by rows of ours.
"""

import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from petals_eval.integrations.lm_eval import command
from petals_eval.local_swarm import LocalSwarm
from petals_eval.text import listed
from tests.cli.invoking import invoke
from tests.interop.lm_eval_tasks import COUNTERPARTS, ROWS
from tests.support.tiny_models import make_tiny

# What the harness does at a deprecated name is its own affair; its command looks through thousands of task files.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

MODELS = ("EleutherAI/gpt-j-6B", "EleutherAI/pythia-160m", "microsoft/phi-2")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TASKS = {"hellaswag": "hellaswag", "lambada_openai": "lambada", "mmlu_abstract_algebra": "hellaswag"}
OTHERS = ("parallelize", "autogptq", "gptqmodel", "delta", "gguf_file", "steer_path")
"""What `hf` does to a model's blocks, which are elsewhere here."""


def readme_commands() -> list[list[str]]:
    """Of the harness's README, the commands that evaluate a model by `hf` and run by themselves."""
    text = importlib.metadata.distribution("lm_eval").read_text("METADATA")
    found = []
    for block in re.findall(r"```(?:bash|)\n(lm_eval .*?)```", text, re.DOTALL):
        words = shlex.split(block.replace("\\\n", " ").rstrip("\\ \n"))
        if words[words.index("--model") + 1] == "hf":
            found.append(words[1:])
    return found


COMMANDS = readme_commands()
RUNNING = [words for words in COMMANDS if not any(f"{other}=" in " ".join(words) for other in OTHERS)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for name in MODELS:
        repository = cache / f"models--{name.replace('/', '--')}"
        make_tiny("llama", repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        for revision in ("main", "step100000"):
            (repository / "refs" / revision).write_text(COMMIT)
    return cache


@pytest.fixture(scope="module")
def tiny_swarm(hub: Path) -> Iterator[LocalSwarm]:
    folder = hub / f"models--{MODELS[0].replace('/', '--')}" / "snapshots" / COMMIT
    with LocalSwarm(folder, servers=2, dht_prefix="tiny", mode="thread") as swarm:
        yield swarm


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's tasks with rows of ours, in the harness's own words."""
    import lm_eval.tasks

    folder = tmp_path_factory.mktemp("tasks")
    for name, counterpart in TASKS.items():
        theirs = Path(lm_eval.tasks.__file__).parent / COUNTERPARTS[counterpart].yaml
        rows = str(ROWS / COUNTERPARTS[counterpart].rows)
        config = {"include": str(theirs), "task": name, "dataset_path": "json", "dataset_name": None}
        config |= {"dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), rows)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def folder(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_readme_has_commands_that_run_and_others() -> None:
    assert len(RUNNING) >= 4 and len(COMMANDS) > len(RUNNING)


@pytest.mark.usefixtures("folder")
@pytest.mark.sample(1)
@pytest.mark.parametrize("words", RUNNING, ids=range(len(RUNNING)))
def test_a_command_of_the_harnesss_readme(words, tiny_swarm, tasks) -> None:
    told = list(words)
    del told[told.index("--model") : told.index("--model") + 2]
    at = told.index("--model_args") + 1
    told[at] += f",dht_prefix=tiny,initial_peers={'+'.join(tiny_swarm.initial_peers)}"
    if "--wandb_args" in told:  # a service of others
        del told[told.index("--wandb_args") : told.index("--wandb_args") + 2]
    outcome = invoke("lm-eval", "--", *told, "--include_path", tasks)
    assert outcome.code == 0
    names = told[told.index("--tasks") + 1].split(",")
    assert all(re.search(rf"^\|{name}\b", outcome.out, re.MULTILINE) for name in names)
    if "--output_path" in told:
        output = Path(told[told.index("--output_path") + 1])
        [results] = output.glob("*/results_*.json")
        [manifest] = output.glob("petals-eval-manifest_*.json")
        found = json.loads(manifest.read_text())
        assert json.loads(results.read_text())["config"]["petals_eval"] | {"updated": ""} == found | {"updated": ""}
        assert sum(found["requests"].values()) > 0 and len(list(output.glob("*/samples_*.jsonl"))) == len(names)


@pytest.mark.usefixtures("folder")
@pytest.mark.soak
def test_what_the_blocks_would_have_to_do_is_refused() -> None:
    [words] = [words for words in COMMANDS if "parallelize=True" in words]
    outcome = invoke("lm-eval", "--", *words[2:], "--model_args", "pretrained=./x,local_swarm=1")
    assert outcome.code == 2 and "unknown setting 'parallelize'" in outcome.error


def test_a_wrong_flag_is_explained_by_the_harness() -> None:
    outcome = invoke("lm-eval", "--", "--taks", "nosuch")
    assert (outcome.code, "unrecognized arguments: --taks" in outcome.err) == (2, True)


def harness_that_refuses() -> None:
    raise ValueError("Tasks not found: nosuch")


def bug_of_ours() -> None:
    listed(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("harness", "code", "said"),
    [
        (harness_that_refuses, 2, "error: lm-evaluation-harness: ValueError: Tasks not found: nosuch"),
        (bug_of_ours, 70, "a bug in petals-eval (TypeError"),
    ],
)
def test_whose_mistake_it_is(harness, code, said, monkeypatch) -> None:
    before = list(sys.argv)
    monkeypatch.setattr(command, "cli_evaluate", harness)
    outcome = invoke("lm-eval", "--", "--tasks", "nosuch")
    assert outcome.code == code and said in outcome.err
    assert sys.argv == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["-h"], ["-h"]),
        (["--tasks", "a"], ["run", "--tasks", "a", "--model", "petals-eval"]),
        (["run", "--tasks", "a"], ["run", "--tasks", "a", "--model", "petals-eval"]),
        (["--model", "hf", "-o", "x", "-a", "b=c"], ["run", "--model", "hf", "-o", "x", "-a", "b=c"]),
        (["--config", "x.yaml", "-o", "x"], ["run", "--config", "x.yaml", "-o", "x"]),
        (
            ["-t", "a", "-o", "out/x", "-a", "b=c"],
            ["run", "-t", "a", "-o", "out/x", "-a", "b=c", "--model", "petals-eval", "--model_args", "manifest='M'"],
        ),
    ],
)
def test_what_is_added_to_the_arguments(arguments, expected, monkeypatch) -> None:
    monkeypatch.setattr(command, "_manifest_beside", lambda output: "M")
    assert command._completed(arguments) == expected


def test_where_the_manifest_goes() -> None:
    assert re.fullmatch(r"out/a,b/petals-eval-manifest_[\dT-]+\.json", command._manifest_beside(Path("out/a,b")))
    assert re.fullmatch(r"out/x_petals-eval-manifest_[\dT-]+\.json", command._manifest_beside(Path("out/x.json")))

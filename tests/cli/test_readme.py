"""What README and guides show is so: their commands and their Python run as they stand.

The commands of a page run inside this process, as they are typed and in their order, in the folder that the pages tell
a user to make (`petals-eval demo --export`). What a test may not have is stood in for, and nothing else:
- the hub: a cache folder with tiny models under the names that the pages use, and a data set made here;
- a running swarm: servers of this process, announced under the names that Petals' rule gives the hub models, and the
  adapter, the model and the training loop that an example takes for its user's own;
- servers of `--local-swarm` and `petals-eval swarm` are threads of this process and not processes, and those that
  commands ask for alike are started once;
- set-up (scripts, pip, containers, other programs' servers) is not run again: the scripts must be there, and parse.

Pages that are about another program's environment are left to tests of their own.
"""

import contextlib
import doctest
import html
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

import petals_eval
import petals_eval.local_swarm
from petals_eval.bench.simulate import read_scenario
from petals_eval.cli.app import COMMANDS
from petals_eval.demo import demo_paths, export_demo
from petals_eval.guides import example_files, guide_titles
from petals_eval.local_swarm import LocalSwarm
from petals_eval.model.dht_prefixes import default_prefix
from petals_eval.model.families import FAMILIES
from petals_eval.tasks import load_task
from tests.cli.invoking import Outcome, invoke
from tests.support.pages import GUIDES, LIVE, PAGES, ROOT, Page, Typed
from tests.support.tiny_models import make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"bigscience/bloom": "bloom", "meta-llama/Llama-2-70b-hf": "llama"}
SET_UP = re.compile(r"scripts/\w+\.sh|python3\.11|pip|docker|source|\.venv[\w-]*/bin/(pip|python)")
MOST_LINES, WIDEST = 250, 120
WHAT_PROMPTS_GIVE = {"runs/late": "accuracy", "runs/early": "accuracy_early"}  # under Hugging Face's own forward

OWN_TESTS = ("epoch_loop", "inspect_ai", "lm_eval")
TRIED = [page for page in PAGES if page.name not in OWN_TESTS]


def steady(text: str) -> str:
    """Without what differs from run to run: identities, ports, speeds, times."""
    text = re.sub(r"12D3KooW\w+", "ID", text)
    text = re.sub(r"/tcp/\d+", "/tcp/PORT", text)
    text = re.sub(r"[\d.,]+ (ex|tok)/s", r"N \1/s", text)
    text = re.sub(r"is below \S+ \(", "is below N (", text)
    return re.sub(r"\d{4}-\d\d-\d\d-\d{4}", "TIME", text)


def not_printed(shown: tuple[str, ...], outcome: Outcome) -> list[str]:
    """The lines of a page that a command did not print; "..." at the end of one stands for the rest of it."""
    printed = steady(outcome.err + outcome.out).splitlines()

    def is_there(line: str) -> bool:
        if line.endswith("..."):
            return any(each.startswith(line.removesuffix("...")) for each in printed)
        return line in printed

    return [line for line in map(steady, shown) if not is_there(line)]


# ---------------------------------------------------------------- what is stood in for


class KeptSwarm(LocalSwarm):
    """A swarm that goes on when a command has ended, for the next one that asks for the same."""

    def __enter__(self) -> LocalSwarm:
        return self if self.servers else self.start()

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def local_swarms() -> Iterator[Callable[..., LocalSwarm]]:
    """What makes a LocalSwarm in threads."""
    kept: dict[str, KeptSwarm] = {}

    def local_swarm(model: str | Path, **options: Any) -> LocalSwarm:
        if options.get("network") is not None:
            return LocalSwarm(model, mode="thread", **options)
        asked = f"{Path(model).name} {sorted((name, value) for name, value in options.items() if value is not None)}"
        if asked not in kept:
            kept[asked] = KeptSwarm(model, mode="thread", **options)
        return kept[asked]

    yield local_swarm
    for swarm in kept.values():
        swarm.stop()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, as huggingface_hub keeps it, with tiny models under the pages' names."""
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


@pytest.fixture(scope="module")
def own_swarm() -> Iterator[list[str]]:
    """The swarm whose address a user has put into PEERS."""
    with LocalSwarm(demo_paths().model, servers=2, dht_prefix="my-llama", mode="thread") as swarm:
        yield swarm.initial_peers


@pytest.fixture
def surroundings(
    hub: Path,
    public_swarm: tuple[str, ...],
    local_swarms: Callable[..., LocalSwarm],
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The machine of a reader."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", _with_sst2(datasets.load_dataset))
    monkeypatch.setattr("petals_eval.cli.open_swarm.PUBLIC_SWARM", public_swarm)
    monkeypatch.setattr(petals_eval.local_swarm, "LocalSwarm", local_swarms)
    monkeypatch.setattr(petals_eval, "LocalSwarm", local_swarms, raising=False)
    monkeypatch.setattr(LocalSwarm, "wait", _interrupted)
    monkeypatch.setenv("COLUMNS", "110")
    return own_folder


def _interrupted(swarm: LocalSwarm) -> None:
    raise KeyboardInterrupt  # the user's Ctrl-C


def _save_prompts(folder: Path) -> None:
    """Prompts of a user's own, for either hub model."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeddings.weight": torch.randn(4, 32, generator=random),
        "score.weight": torch.randn(2, 32, generator=random),
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


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", [page for page in TRIED if page.typed()], ids=lambda page: page.name)
def test_the_commands_of_a_page(
    page: Page, surroundings: Path, own_swarm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name != "README":  # whose reader makes this folder by a command of it
        export_demo(surroundings)
    for command in page.typed():
        if command.is_live and not Path("sst2-prompts").exists():
            _save_prompts(Path("sst2-prompts"))
        if command.words[0] == "cd":
            monkeypatch.chdir(command.words[1])
        elif command.is_ours:
            print("$", *command.words)
            check(command, invoke(*with_peers(command, own_swarm)[1:]))
        else:
            check_set_up(command)
    # What Python does with the runs that these commands made.
    for example in page.blocks("pycon"):
        tried = doctest.DocTestParser().get_doctest(example, {}, page.name, None, None)
        assert doctest.DocTestRunner().run(tried).failed == 0


def with_peers(command: Typed, peers: list[str]) -> tuple[str, ...]:
    """The words of a command, with the addresses of the swarm that it needs."""
    needs = "--public-swarm" in command.words or "--initial-peers" in command.words
    assert command.is_live == needs, f"a block of such commands begins with {LIVE!r}, and no other one"
    if "--initial-peers" not in command.words:
        return command.words
    at = command.words.index("--initial-peers") + 1
    return (*command.words[:at], *peers, *command.words[at + 1 :])


def check(command: Typed, outcome: Outcome) -> None:
    words = command.words
    assert outcome.code == 0
    if words[1:] != ("demo",):  # which takes its words from the package
        assert not_printed(command.shown, outcome) == []
    if "--public-swarm" in words and "--dry-run" not in words:
        assert "strangers' machines see the activations of these examples" in outcome.err
    if "--dry-run" in words:
        assert outcome.out.endswith("nothing was sent\n")
        assert "2 servers hold these 3 blocks" in outcome.out
    if "--out" in words:
        made = Path(words[words.index("--out") + 1])
        assert made.is_file() if made.suffix else (made / "metrics.json").is_file()
    if words[1] == "run" and words[-1] in WHAT_PROMPTS_GIVE:
        expected = json.loads(demo_paths().expected.read_text())[WHAT_PROMPTS_GIVE[words[-1]]]
        assert json.loads(Path(words[-1], "metrics.json").read_text())["metrics"]["accuracy"]["value"] == expected
        repeated = html.unescape(Path(words[-1], "report.html").read_text())
        assert "--task '<your task file reviews.yaml>' --data reviews.jsonl " in repeated
        assert "--local-swarm 3</code>" in repeated
    if words[1] == "health" and "--html" in words:
        assert "<!doctype html>" in Path("health.html").read_text()
        assert json.loads(outcome.out)["verdict"] == "healthy"
    elif words[1] == "run" and "--json" in words:
        assert json.loads(outcome.out)["n_examples"] == 50  # the flag's limit, not the file's
    if "--latex" in words:
        assert r"\toprule" in outcome.out


def check_set_up(command: Typed) -> None:
    program = command.words[0]
    assert SET_UP.fullmatch(program)
    if program == "docker":
        assert (ROOT / command.words[command.words.index("-f") + 1]).is_file()
    if program.startswith("scripts/"):
        assert os.access(ROOT / program, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / program], check=True)


def test_the_demo_prints_what_the_readme_shows_and_shows_what_prompts_are_worth() -> None:
    [demo] = [each for each in Page("README").typed() if each.words == ("scripts/demo.sh",)]
    assert 'exec .venv/bin/petals-eval demo "$@"' in (ROOT / "scripts/demo.sh").read_text()
    outcome = invoke("demo")
    assert outcome.code == 0
    assert not_printed(demo.shown, outcome) == []

    folder = Path(outcome.out.splitlines()[-2].removeprefix("run folder: "))
    assert outcome.out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    found = json.loads((folder / "metrics.json").read_text())
    expected = json.loads(demo_paths().expected.read_text())
    assert found["metrics"]["accuracy"]["value"] == expected["accuracy"]
    assert found["without_prompts"]["metrics"]["accuracy"]["value"] == expected["accuracy_without_prompts"]
    assert expected["accuracy"] > 0.9 and abs(expected["accuracy_without_prompts"] - 0.5) < 0.05


@pytest.mark.parametrize("page", [page for page in TRIED if page.blocks("python")], ids=lambda page: page.name)
def test_the_python_of_a_page(
    page: Page, surroundings: Path, public_swarm: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_demo(surroundings)
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for example in page.blocks("python"):
            if example.startswith(LIVE):
                names |= users_own(public_swarm, stack, monkeypatch)
            exec(example, names)
    if "accuracy" in names:
        assert names["accuracy"].value > 0.9 and names["accuracy"].ci95[0] < names["accuracy"].value
    if "metrics" in names:
        metrics, result = names["metrics"], names["result"]
        assert metrics["n"] == len(result.predictions) == 400
        for ours, theirs in (("accuracy", "accuracy"), ("f1", "f1_macro")):
            assert metrics[ours] == pytest.approx(result.metrics[theirs].value)
        assert Path("runs/from-python/report.md").exists()
    if "found" in names:
        assert names["found"].forgotten.in_eval == 1 > min(names["found"].forgotten.in_training)


def users_own(
    peers: tuple[str, ...], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """What an example takes for its user's: a training loop on a Petals model. tests/interop has real ones.

    The package of Petals, which this environment does not hold, gives a model of ours in the place of its own.
    """
    if not Path("sst2-prompts").exists():
        _save_prompts(Path("sst2-prompts"))

    def from_pretrained(model: str, *, initial_peers: tuple[str, ...], **tuning: object) -> petals_eval.RemoteModel:
        return stack.enter_context(
            petals_eval.RemoteModel.from_pretrained(model, adapter="sst2-prompts", initial_peers=initial_peers)
        )

    petals = types.ModuleType("petals")
    vars(petals)["AutoDistributedModelForSequenceClassification"] = types.SimpleNamespace(
        from_pretrained=from_pretrained
    )
    monkeypatch.setitem(sys.modules, "petals", petals)
    # It gives Petals its names in hivemind, for good.
    flat = types.ModuleType("petals_eval.integrations.hivemind_flat")
    monkeypatch.setitem(sys.modules, flat.__name__, flat)
    model = from_pretrained("bigscience/bloom", initial_peers=peers)
    return {"model": model, "peers": peers, "train": lambda *_: None}


def test_the_readme_is_short_and_no_page_is_wide() -> None:
    assert len(Page("README").text.splitlines()) <= MOST_LINES
    wide = [f"{page.name}: {line}" for page in PAGES for line in page.text.splitlines() if len(line) > WIDEST]
    assert wide == []


def test_the_pages_name_what_there_is() -> None:
    everything = "\n".join(page.text for page in TRIED)
    assert set(re.split(r",\s+", re.findall(r"lists them: ([^.]*)\.", Page("tasks").text)[0])) == {
        task.name for task in petals_eval.tasks.list_tasks()
    }
    assert f"one of {len(petals_eval.tasks.list_tasks())} tasks that ship" in Page("README").text
    assert all(family.title in re.sub(r"\s+", " ", Page("models").text) for family in FAMILIES.values())
    commands = [name for name in COMMANDS if name not in ("bench", "lm-eval")]
    commands += ["", "bench forward", "bench inference", "bench simulate"]
    shown = "".join(invoke(*command.split(), "--help").out for command in commands)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w-])", everything)) - {"--config-settings", "--index-url"}
    others = {word for page in TRIED for each in page.typed() if not each.is_ours for word in each.words}
    assert [flag for flag in sorted(flags - others) if not re.search(rf"{flag}\b", shown)] == []
    for name in petals_eval.metrics.METRICS:
        stem = re.sub(r"_(macro|micro|weighted|per_class)$", "", name)
        assert stem.replace("majority_baseline", "majority baseline") in Page("metrics").text


def test_the_pages_point_to_guides_that_there_are() -> None:
    sources = [path.read_text() for path in (ROOT / "petals_eval").rglob("*.py")]
    pointed = re.findall(r"petals-eval guide\s([a-z_]+)", "\n".join([*(page.text for page in PAGES), *sources]))
    table = re.findall(r"^\| (`.*`) \|", Page("README").text, re.MULTILINE)
    named = {*pointed, *re.findall(r"`(\w+)`", " ".join(table))}
    assert named - guide_titles().keys() == set()


def test_the_files_that_pages_show_are_exported_and_read(own_folder: Path) -> None:
    outcome = invoke("demo", "--export", "trial")
    assert outcome.code == 0
    shown = [re.match(r"# (\S+\.yaml)\n", block) for page in PAGES for block in page.blocks("yaml")]
    assert all(shown), "a YAML example begins with its file's name"
    exported = {path.name: path.read_text() for path in Path("trial").glob("*.yaml")}
    assert exported == example_files() and exported.keys() == {each[1] for each in shown if each is not None}
    blocks = {block for page in PAGES for block in page.blocks("yaml")}
    assert blocks == set(exported.values()), "two pages show two files of one name"
    for name, text in exported.items():
        if re.search(r"^servers:$", text, re.MULTILINE):
            assert read_scenario(str(Path("trial", name)))[0] == name
        elif not re.search(r"^(model|task|group): ", text, re.MULTILINE):
            assert load_task(Path("trial", name)).name == Path(name).stem
    again = invoke("demo", "--export", "trial")
    assert again.code == 2 and "expected a new or an empty folder" in again.error
    assert invoke("demo", "--export", "other", "--json").code == 2 and not Path("other").exists()


def test_the_guides_are_listed_and_shown() -> None:
    listed = invoke("guide").out.splitlines()
    for page in GUIDES:
        assert any(line.split()[:1] == [page.name] for line in listed)
        assert invoke("guide", page.name).out == page.text
    assert max(map(len, listed)) <= WIDEST
    wrong = invoke("guide", "promts")
    assert (
        wrong.code == 2 and "Did you mean prompts?" in wrong.error and "There are: choices, containers" in wrong.error
    )

"""The manifest: what is in it, what is never in it, and what differs between two."""

import getpass
import json
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from petals_eval.errors import ConfigError, MachineError, RunFolderError
from petals_eval.runs import (
    AdapterRecord,
    DataRecord,
    Manifest,
    ModelRecord,
    NoisyServer,
    WireRecord,
    WireSample,
    difference,
)
from petals_eval.runs.manifest import package_versions
from petals_eval.runs.privacy import shareable_name, shareable_settings
from tests.runs.samples import SERVERS, manifest, reachable_folder, unprivileged

TOKEN = "hf_" + "x" * 34


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = manifest().finish(SERVERS)
    written.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == written
    stored = json.loads((tmp_path / "manifest.json").read_text())
    assert stored["schema_version"] == 2
    assert stored["servers"][1] == {
        "peer_id": "12D3KooWBeta",
        "first": 3,
        "end": 5,
        "version": "2.3.0.dev2",
        "dtype": "bfloat16",
        "quant": "nf4",
    }
    assert stored["finished"] >= stored["created"]
    assert {"python", "petals_eval", "torch", "transformers", "hivemind", "numpy"} <= set(stored["packages"])
    assert stored["answer_settings"] != stored["run_settings"]


def test_fields_of_later_releases_are_left_out_and_none_is_made_up(tmp_path: Path) -> None:
    noisy = NoisyServer("12D3KooWAlpha", 0, 3, None, 0.1, is_used=False)
    wire = WireRecord("float16", WireSample("trec-ptune", 16, 0.1, 0.01, 0))
    written = manifest().finish(SERVERS).model_copy(update={"noisy_servers": (noisy,), "wire": wire})
    written.write(tmp_path / "manifest.json")
    stored = json.loads((tmp_path / "manifest.json").read_text())
    inner = (stored["model"], stored["adapters"][0], stored["data"], stored["servers"][0], stored["noisy_servers"][0])
    for each in (stored, *inner, stored["wire"], stored["wire"]["sample"]):
        each["in_a_later_release"] = {"any": ["thing"]}
    (tmp_path / "manifest.json").write_text(json.dumps(stored))
    assert Manifest.read(tmp_path / "manifest.json") == written
    with pytest.raises(ValidationError, match="unknown fields revisoin"):
        ModelRecord(name="m", sha256="aa", revisoin="abc")  # type: ignore[call-arg]


def test_no_path_host_user_or_token_gets_in(tmp_path: Path) -> None:
    home = str(Path.home())
    made = manifest(
        model=ModelRecord(name=f"{home}/models/stories260K-hf", sha256="aa"),
        adapters=[AdapterRecord(name=str(tmp_path / "adapters" / "trec-ptune"), kind="ptune", sha256="bb")],
        data=DataRecord(name=f"file://{home}/data/test.txt", fingerprint="cc"),
        task={"name": "trec", "data": {"path": f"{home}/trec/test.txt", "token": TOKEN}, "files": ["./x/y.csv"]},
        answer_settings={"HF_TOKEN": TOKEN, "note": f"cached in {home}/.cache", "seen": f"?auth={TOKEN}"},
        run_settings={"cache_dir": str(tmp_path), "windows": "C:\\Users\\mallory\\runs", "out": "../runs/sst2"},
    ).finish(SERVERS)
    made.write(tmp_path / "manifest.json")
    text = (tmp_path / "manifest.json").read_text()
    for secret in (TOKEN, str(tmp_path), str(tmp_path.parent), socket.gethostname(), "Users", "mallory", "../", "./x"):
        assert secret not in text, secret
    if len(home) > 1:
        assert home not in text
    if len(getpass.getuser()) > 4:  # "root" and the like are parts of honest words
        assert getpass.getuser() not in text
    assert made.model.name == "stories260K-hf"
    assert made.adapters[0].name == "trec-ptune"
    assert made.data.name == "test.txt"
    assert made.task["data"] == {"path": "test.txt", "token": "[removed]"}
    assert made.run_settings == {"cache_dir": tmp_path.name, "windows": "runs", "out": "sst2"}


@pytest.mark.parametrize("key", ["token", "secret", "password", "Auth"])
def test_tasks_that_differ_where_a_secret_could_be_differ(tmp_path: Path, key: str) -> None:
    """A label may be called token, and a text may look like a path: the task is another one all the same."""
    task = {"name": "words", "label_map": {key: "noun", "go": "verb"}, "text": "/a/ {word}"}
    before = manifest(task=task)
    assert key in before.task["label_map"]
    for other in (
        {**task, "label_map": {key: "verb", "go": "verb"}},
        {**task, "label_map": {"go": "verb"}},
        {**task, "label_map": {key: "noun", "go": "verb", "./x": "noun"}},
    ):
        lines = difference(before, manifest(task=other))
        assert any(line.startswith("task.sha256: was ") for line in lines)
    assert difference(before, manifest(task=dict(reversed(task.items())))) == []
    before.write(tmp_path / "manifest.json")
    assert difference(Manifest.read(tmp_path / "manifest.json"), before) == []


def test_names_of_hubs_and_templates_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shareable_name("meta-llama/Llama-2-70b-hf") == "meta-llama/Llama-2-70b-hf"
    assert shareable_name("sst2 validation") == "sst2 validation"
    template = {"text": "{premise} / {hypothesis}", "other": "/ {x}", "max_tokens": 5, "pad_token": "</s>"}
    assert shareable_settings(template) == template
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shareable_name("mine/llama") == "llama"


def test_versions_come_without_importing_the_packages() -> None:
    versions = package_versions()
    assert versions["python"].startswith("3.")
    assert versions["torch"][0].isdigit()


def test_runs_that_answer_alike_do_not_differ() -> None:
    before = manifest()
    assert difference(before, manifest(run_settings={"max_tokens": 64}, seeds={"bootstrap": 9})) == []
    other_sample_seed = DataRecord(name="test.txt", fingerprint="cc" * 32, limit=None, seed=5)
    assert difference(before, manifest(data=other_sample_seed)) == []
    assert difference(before, before.finish(SERVERS)) == []
    other_python = before.model_copy(update={"packages": before.packages | {"python": "3.99", "numpy": "9"}})
    assert difference(before, other_python) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"answer_settings": {"dtype": "bfloat16", "compression": "none"}}, "setting.dtype: was float32, now bfloat16"),
        ({"model": ModelRecord(name="stories260K-hf", sha256="dd")}, "model.sha256: was " + "aa" * 28 + "a..., now dd"),
        (
            {"adapters": [AdapterRecord(name="other", kind="ptune", sha256="bb")]},
            "adapter: was trec-ptune, now other",
        ),
        (
            {"data": DataRecord(name="test.txt", fingerprint="cc" * 32, limit=5, seed=0)},
            "data.limit: was nothing, now 5",
        ),
        ({"task": {"name": "trec", "text": "Q: {question}"}}, "task.text: was {question}, now Q: {question}"),
    ],
)
def test_what_changes_answers_differs_in_a_line_for_a_person(changes: dict, line: str) -> None:
    assert line in difference(manifest(), manifest(**changes))


def test_another_release_of_what_computes_answers_differs() -> None:
    before = manifest()
    after = before.model_copy(update={"packages": before.packages | {"torch": "0.1"}})
    assert difference(before, after) == [f"package.torch: was {before.packages['torch']}, now 0.1"]


@pytest.mark.parametrize(
    ("column", "package", "another"),
    [("bleu/right_1", "sacrebleu", "rouge-score"), ("rougeL", "rouge-score", "sacrebleu")],
)
def test_another_release_of_what_counts_in_texts_differs_where_it_counted(
    column: str, package: str, another: str
) -> None:
    assert package_versions()[package][0].isdigit()
    before = manifest(kind="generation", answer_columns=("new_tokens", column))
    after = before.model_copy(update={"packages": before.packages | {package: "0.0.1", another: "0.0.1"}})
    assert difference(before, after) == [f"package.{package}: was {before.packages[package]}, now 0.0.1"]


def test_a_limited_sample_differs_by_its_seed() -> None:
    one, two = (manifest(data=DataRecord(name="t", fingerprint="c", limit=5, seed=seed)) for seed in (1, 2))
    assert difference(one, two) == ["data.seed: was 1, now 2"]


def test_adapters_of_one_name_are_refused() -> None:
    twice = [AdapterRecord(name=f"{folder}/x/prompts", kind="ptune", sha256="b") for folder in "ab"]
    with pytest.raises(ConfigError, match="adapters of different names; found 'prompts' 2 times"):
        manifest(adapters=twice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "schema_version: Field required"),
        ("not json", "Expected the manifest of a run"),
        ('{"schema_version": 3, "something": "new"}', "found 3. A newer petals-eval wrote it"),
        ('{"schema_version": 1, "created": "x"}', "model: Field required"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunFolderError, match=message):
        Manifest.read(tmp_path / "manifest.json")


def test_a_folder_without_permission_is_the_machines_fault() -> None:
    with reachable_folder() as folder:
        folder.chmod(0o555)
        with unprivileged(), pytest.raises(MachineError, match="No permission: choose another"):
            manifest().write(folder / "manifest.json")
        assert list(folder.iterdir()) == []

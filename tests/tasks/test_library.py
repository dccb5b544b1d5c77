"""Tasks by name and by file, the data they read, and what is said of a wrong file."""

import json
import subprocess
import sys
from types import MappingProxyType

import datasets
import pytest

from petals_eval.data import DataSource, load_rows
from petals_eval.data.yaml_text import read_yaml
from petals_eval.errors import ConfigError, DataError, TaskError
from petals_eval.metrics import check_metric_names
from petals_eval.tasks import ClassificationTask, Task, list_tasks, load_group, load_task, resolve_source

GOOD = """
text: "{text}"
label_column: label
label_names: [neg, pos]
metrics: [accuracy]
"""


def written(folder, content: str, name: str = "mine.yaml"):
    path = folder / name
    path.write_text(content)
    return path


def fails(task) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(task)
    assert caught.value.exit_code == 2
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_tasks():
    tasks = list_tasks()
    assert [task.name for task in tasks] == sorted(task.name for task in tasks)
    trained = [task.name for task in tasks if task.kind == "classification"]
    assert trained == [
        *("ag_news", "boolq", "cb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "trec", "wic"),
    ]
    asked = {"copa", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"}
    asked |= {f"{name}_choice" for name in trained if name not in ("ag_news", "trec")}
    assert {task.name for task in tasks if task.kind == "choice"} == asked
    others = {task.kind: task.name for task in tasks if task.kind not in ("classification", "choice")}
    assert others == {"continuation": "lambada", "perplexity": "wikitext", "generation": "gsm8k"}
    for task in tasks:
        assert isinstance(task, Task) and task.head == ("class" if task.kind == "classification" else "lm")
        assert load_task(task.name) == task
        assert check_metric_names(task.metrics, task.kind, label_names=task.label_names) == task.metrics
        assert task.description
        assert resolve_source(task).split in ("test", "validation", "validation_matched")


def test_listing_tasks_imports_nothing_heavy():
    code = (
        "import sys; import petals_eval.tasks as t; t.list_tasks(); "
        "print([m for m in ('torch', 'datasets', 'sklearn', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_of_ones_own(tmp_path):
    task = load_task(written(tmp_path, GOOD))
    assert isinstance(task, ClassificationTask)
    assert (task.name, task.label_names, task.metrics) == ("mine", ("neg", "pos"), ("accuracy",))
    assert load_task(str(tmp_path / "mine.yaml")) == task
    assert load_task(task) is task


def test_a_mapping_is_what_a_file_would_hold(tmp_path):
    mapping = {"text": "{text}", "label_column": "label", "label_names": ["neg", "pos"], "metrics": ("accuracy",)}
    task = load_task(mapping)
    assert (task.name, task.fingerprint()) == ("task", load_task(written(tmp_path, GOOD)).fingerprint())
    named, written_down = load_task(MappingProxyType({**mapping, "name": "mine"})), load_task(tmp_path / "mine.yaml")
    assert isinstance(named, ClassificationTask) and isinstance(written_down, ClassificationTask)
    assert named.model_dump() == written_down.model_dump()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ["acuracy"]}, "the task's mapping: metrics: Expected the name of a metric"),
        ({"labels": []}, "the task's mapping: this task cannot be used:\n  labels: unknown key"),
        ({"kind": "clasification"}, "the task's mapping: kind should be one of classification, "),
        ({1: 2}, "the task's mapping: every key should be text, found 1"),
        ({"text": None}, "text: should be a valid string, found nothing"),
    ],
)
def test_a_wrong_mapping(changes, said):
    mapping = {"text": "{text}", "label_column": "label", "label_names": ["neg", "pos"], **changes}
    assert said in fails(mapping)


def test_data_beside_the_task_file(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,pos\n")
    task = load_task(written(tmp_path, GOOD + "data: {path: rows.csv}\n"))
    assert len(load_rows(resolve_source(task))) == 1


def shots_path(task):
    return task.shots.data.path


def test_shots_beside_the_task_file_and_beside_that_of_a_group(tmp_path):
    (tmp_path / "shots.csv").write_text("text,label\na,pos\n")
    definition = GOOD + "shots: {count: 1, data: {path: shots.csv}}\n"
    assert shots_path(load_task(written(tmp_path, definition))) == str(tmp_path / "shots.csv")
    member = {**read_yaml(definition), "name": "one"}
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "both", "tasks": [member]}))
    assert shots_path(load_group(tmp_path / "group.yaml").tasks[0]) == str(tmp_path / "shots.csv")
    elsewhere = definition.replace("shots.csv", "other.csv")
    assert shots_path(load_task(written(tmp_path, elsewhere))) == "other.csv"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + "max_lenght: 3\n", "max_lenght: unknown key. Did you mean max_length?"),
        (GOOD + "max_length: many\n", "max_length: should be a valid integer"),
        (GOOD.replace("[accuracy]", "[acuracy]"), "metrics: "),
        (
            GOOD + "metrics: [accuracy]\n",
            ", line 6: not valid YAML: the key 'metrics' is given twice, here and in line 5",
        ),
        (GOOD + "label_map:\n  a: neg\n  'a': pos\n", ", line 8: not valid YAML: the key 'a' is given twice"),
        (GOOD + "max_length: 1e2\n", "max_length: should be a valid integer"),
        (GOOD + "max_length: 1:30\n", "max_length: should be a valid integer"),
        (GOOD + "max_length: null\n", "max_length: should be a valid integer, found nothing"),
        (GOOD.replace('"{text}"', "{text}"), "a text that begins with { or [ stands in quotes"),
        ("text: [\n", "not valid YAML"),
        ("- a\n- b\n", "expected keys and values"),
        ("", "expected keys and values"),
        (GOOD + "kind: poetry\n", "kind should be one of classification, "),
        (GOOD + "1: x\n", "1: unknown key."),
        (GOOD + "!!int 1: x\n", "every key should be text, found 1"),
        (GOOD + "data: {path: a/b, pattern: '('}\n", "pattern: should be a regular expression"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, content, expected):
    path = written(tmp_path, content)
    message = fails(path)
    assert message.startswith(str(path)) and expected in message


def test_a_syntax_error_names_the_line(tmp_path):
    assert ", line 3: not valid YAML" in fails(written(tmp_path, 'name: a\ntext: "{x}\n'))


def test_names_that_are_no_task(tmp_path):
    message = fails("sst")
    assert "there is no task sst. Did you mean sst2?" in message and "ag_news, arc_challenge, arc_easy, " in message
    assert "there is no task file ./none.yaml (looked for /" in fails("./none.yaml")
    assert "expected the name of a task" in fails(3)
    binary = tmp_path / "a.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "expected a YAML file in utf-8" in fails(binary)


def test_metrics_of_a_task_object_are_checked():
    task = ClassificationTask(name="t", text="{a}", label_column="b", label_names=["x", "y"], metrics=["nope"])
    assert "the task object: metrics: " in fails(task)


@pytest.mark.parametrize(
    ("name", "file", "count"), [("trec", "trec/TREC.test.all", 500), ("sst2", "sst2/dev.tsv", 872)]
)
def test_local_files_need_no_flags(realdata, name, file, count):
    assert len(load_rows(resolve_source(load_task(name), realdata / file))) == count


def test_the_original_trec_lines(tmp_path, tokenizer):
    path = tmp_path / "TREC_10.label"
    path.write_bytes(b"NUM:dist How far is it ?\nDESC:def What is caf\xe9 ?\nABBR:exp What is : NASA ?\n")
    task = load_task("trec")
    found = list(task.examples(load_rows(resolve_source(task, path)), tokenizer))
    assert [task.label_names[one.label] for one in found] == ["number", "description", "abbreviation"]
    assert [one.text for one in found] == ["How far is it ?", "What is caf\xe9 ?", "What is : NASA ?"]


def test_the_hubs_trec_order_does_not_mix_up_the_labels(monkeypatch, tokenizer):
    """The hub numbers ABBR 0, ENTY 1, DESC 2; the heads of this task were trained on description 0, abbreviation 2."""
    names = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    features = datasets.Features({"text": datasets.Value("string"), "coarse_label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"text": names, "coarse_label": list(range(6))}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: table)
    task = load_task("trec")
    found = list(task.examples(load_rows(resolve_source(task)), tokenizer))
    assert {one.text: task.label_names[one.label] for one in found} == {
        "ABBR": "abbreviation",
        "ENTY": "entity",
        "DESC": "description",
        "HUM": "human",
        "LOC": "location",
        "NUM": "number",
    }
    assert [one.label for one in found] == [2, 1, 0, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("sst2", ["sentence"], ["negative", "positive"]),
        ("cola", ["sentence"], ["unacceptable", "acceptable"]),
        ("rte", ["sentence1", "sentence2"], ["entailment", "not_entailment"]),
        ("ag_news", ["text"], ["World", "Sports", "Business", "Sci/Tech"]),
    ],
)
def test_the_hubs_columns_and_class_names_fit_the_shipped_tasks(monkeypatch, tokenizer, name, columns, labels):
    features = datasets.Features(
        {**{column: datasets.Value("string") for column in columns}, "label": datasets.ClassLabel(names=labels)}
    )
    values = {column: ["x"] * len(labels) for column in columns}
    table = datasets.Dataset.from_dict({**values, "label": list(range(len(labels)))}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: table)
    task = load_task(name)
    found = list(task.examples(load_rows(resolve_source(task)), tokenizer))
    assert [one.label for one in found] == list(range(len(labels)))


def test_boolq_answers_are_truth_values(tmp_path, tokenizer):
    path = tmp_path / "dev.jsonl"
    path.write_text(
        '{"question": "is it", "passage": "p", "answer": true}\n{"question": "q", "passage": "p", "answer": false}\n'
    )
    task = load_task("boolq")
    found = list(task.examples(load_rows(resolve_source(task, path)), tokenizer))
    assert [task.label_names[one.label] for one in found] == ["yes", "no"]
    assert found[0].text == "is it?\np"


def test_overrides_win_and_none_changes_nothing(tmp_path):
    [trec] = [task for task in list_tasks() if task.name == "trec"]
    assert resolve_source(trec, split="train", revision=None) == DataSource(
        path="CogComp/trec", revision="refs/convert/parquet", split="train"
    )
    local = resolve_source(trec, "x.all", format="lines", encoding="utf-8")
    assert (local.encoding, local.pattern) == ("utf-8", trec.formats["lines"].pattern)
    assert resolve_source(trec, "./x.csv") == DataSource(path="./x.csv")
    secret = resolve_source(trec, token="hf_secret").token
    assert secret is not None and secret.get_secret_value() == "hf_secret"


def test_another_hub_name_takes_nothing_of_the_default_data():
    assert resolve_source(load_task("sst2"), "me/mine", split="test") == DataSource(path="me/mine", split="test")
    assert resolve_source(load_task("sst2"), "nyu-mll/glue").subset == "sst2"


def test_a_task_without_data(tmp_path):
    with pytest.raises(ConfigError, match="task mine has no data of its own: give --data"):
        resolve_source(load_task(written(tmp_path, GOOD)))


def test_a_wrong_override():
    with pytest.raises(DataError, match=r"colum_names: unknown key\. Did you mean column_names\?"):
        resolve_source(load_task("sst2"), "x.tsv", colum_names=["a"])

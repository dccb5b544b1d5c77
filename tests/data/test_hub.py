"""Data sets of the hub: what is asked of `datasets`, and what a person reads when it does not work."""

from pathlib import Path

import datasets
import pytest

from petals_eval.data import DataSource, load_rows
from petals_eval.errors import DataError, MachineError


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with `hub.answer`, or raises it, and remembers what it was asked."""

    class Hub:
        answer: object = None
        asked: tuple = ()

    def load_dataset(*args, **settings):
        Hub.asked = (args, settings)
        if isinstance(Hub.answer, BaseException):
            raise Hub.answer
        return Hub.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


def small(labels=("ABBR", "ENTY")) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(labels))})
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)


def fails(**settings) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(DataSource(**{"path": "owner/name", **settings}))
    return str(caught.value)


def test_a_split_of_a_hub_data_set(hub):
    hub.answer = small()
    rows = load_rows(DataSource(path="owner/name", subset="sub", split="test", revision="abc", token="secret"))
    assert hub.asked == (
        ("owner/name", "sub"),
        {"split": "test", "revision": "abc", "token": "secret", "cache_dir": None},
    )
    assert rows.name == "owner/name sub test"
    assert [row.columns["label"] for row in rows] == [0, 1]
    assert rows.class_names == {"label": ("ABBR", "ENTY")}
    assert len(rows.fingerprint) == 64


def test_the_fingerprint_tells_class_names_apart(hub):
    prints = set()
    for labels in (("ABBR", "ENTY"), ("ENTY", "ABBR")):
        hub.answer = small(labels)
        prints.add(load_rows(DataSource(path="owner/name", split="test")).fingerprint)
    assert len(prints) == 2


def test_a_single_split_needs_no_name(hub):
    hub.answer = datasets.DatasetDict(test=small())
    assert len(load_rows(DataSource(path="owner/name"))) == 2


def test_several_splits_are_listed(hub):
    hub.answer = datasets.DatasetDict(train=small(), test=small())
    assert "has several splits: test, train" in fails()


def test_an_empty_split(hub):
    hub.answer = small().select([])
    assert "split test of owner/name is empty" in fails(split="test")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
            "has no split 'dev'. The splits there are: train, test.",
        ),
        (
            ValueError("BuilderConfig 'sub' not found. Available: ['cola', 'sst2']"),
            "has no subset 'sub'. The subsets there are: cola, sst2.",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']"),
            "has several subsets: cola, sst2.",
        ),
        (FileNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub."), "is gated or private on the hub"),
        (FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"), "no data set owner/name on the hub"),
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "the hub cannot be reached"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found name.py"),
            "set revision: refs/convert/parquet",
        ),
        (ValueError("something new"), "owner/name cannot be loaded: something new"),
    ],
)
def test_errors_say_what_to_do(hub, raised, expected):
    hub.answer = raised
    assert expected in fails(split="dev", subset="sub")


def test_a_cache_that_cannot_be_written(hub):
    hub.answer = PermissionError("no")
    with pytest.raises(MachineError, match="Set HF_DATASETS_CACHE"):
        load_rows(DataSource(path="owner/name"))


def test_a_name_that_is_no_hub_name(hub):
    assert "neither a file nor the name of a data set on the hub" in fails(path="a/b/c d")


def test_a_local_folder(tmp_path: Path):
    for split, text in (("train", "x"), ("test", "y")):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{text},1\n")
    rows = load_rows(DataSource(path=str(tmp_path), split="test"))
    assert [dict(row.columns) for row in rows] == [{"text": "y", "label": "1"}]
    assert rows.name == f"{tmp_path.name} test"
    assert "has no split 'dev'. The splits there are: train, test." in fails(path=str(tmp_path), split="dev")


def test_csv_in_a_folder_is_read_as_it_is_written(tmp_path: Path):
    (tmp_path / "data.csv").write_text("text,label,note\nNA,00,1e3\nnull,01,\n,True,2020-01-01\n")
    rows = load_rows(DataSource(path=str(tmp_path)))
    assert [tuple(row.columns.values()) for row in rows] == [
        ("NA", "00", "1e3"),
        ("null", "01", ""),
        ("", "True", "2020-01-01"),
    ]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_in_a_folder_is_read_as_it_is_written(tmp_path: Path, ending: str):
    (tmp_path / f"test-1.{ending}").write_text('{"text": "2020-01-01", "n": 4, "label": 1}\n')
    rows = load_rows(DataSource(path=str(tmp_path), split="test"))
    assert [(row.line, row.columns["text"]) for row in rows] == [(1, "2020-01-01")]
    alone = rows.fingerprint
    (tmp_path / f"test-2.{ending}").write_text('{"text": "b", "n": 4.50, "label": "x", "late": true}\n')
    rows = load_rows(DataSource(path=str(tmp_path)))
    assert rows.columns == ("text", "n", "label", "late") and rows.truth_words == ("false", "true")
    assert [(row.line, row.columns["text"], str(row.columns["n"])) for row in rows] == [
        (None, "2020-01-01", "4"),
        (None, "b", "4.50"),
    ]
    assert len({rows.fingerprint, alone}) == 2
    again = load_rows(DataSource(path=str(tmp_path), split="test"))
    assert again.fingerprint == rows.fingerprint
    (tmp_path / f"test-2.{ending}").write_text('{"text": "b"\n')
    assert f"test-2.{ending} cannot be read" in fails(path=str(tmp_path))
    (tmp_path / f"test-2.{ending}").write_bytes(b'{"text": "\xff"}\n')
    assert "is not utf-8" in fails(path=str(tmp_path))


def test_json_in_a_folder_without_that_split(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a"}\n')
    assert "has several splits: test, train" in fails(path=str(tmp_path))
    assert "has no split 'dev'. The splits there are: train, test." in fails(path=str(tmp_path), split="dev")


def test_class_names_that_a_folder_declares_stay(tmp_path: Path):
    (tmp_path / "data.csv").write_text("text,label\na,1\n")
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': bad\n          '1': good\n---\n"
    )
    rows = load_rows(DataSource(path=str(tmp_path)))
    assert rows.class_names == {"label": ("bad", "good")}
    assert [row.columns["label"] for row in rows] == [1]


@pytest.mark.parametrize("name", ["mine", "pytest-401", "gated"])
def test_an_empty_folder(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    assert "holds no data that can be loaded" in fails(path=str(tmp_path / name))


@pytest.mark.parametrize("before", [True, False])
def test_progress_bars_are_off_and_given_back(monkeypatch, before):
    from datasets.utils import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    seen = []

    def load_dataset(*args, **settings):
        seen.append(is_progress_bar_enabled())
        raise ValueError("stopped")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first = is_progress_bar_enabled()
    (enable_progress_bar if before else disable_progress_bar)()
    try:
        fails()
        assert seen == [False]
        assert is_progress_bar_enabled() == before
    finally:
        (enable_progress_bar if first else disable_progress_bar)()

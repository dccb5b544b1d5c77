"""Parquet and Arrow files: their values, their class names, and columns of any type that nobody reads."""

import datetime
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from petals_eval.data import DataSource, Rows, load_rows
from petals_eval.errors import DataError


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "parquet": lambda table, path: pyarrow.parquet.write_table(table, path, row_group_size=2),
    "feather": lambda table, path: pyarrow.feather.write_feather(table, str(path), compression="lz4"),
    "arrow": write_stream,
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """Writes a table as one kind of file, and reads it."""

    def write(table: pa.Table, name: str | None = None) -> Rows:
        path = tmp_path / (name or f"a.{request.param}")
        WRITERS[request.param](table, path)
        return load_rows(DataSource(path=str(path)))

    return write


def test_values_have_the_types_of_the_file(written):
    day = datetime.date(2020, 1, 2)
    table = pa.table(
        {"text": ["a", None, "c"], "label": [True, False, None], "day": [day] * 3, "parts": [[1], [], None]}
    )
    rows = written(table)
    assert [dict(row.columns) for row in rows] == table.to_pylist()
    assert [(row.index, row.line) for row in rows] == [(0, None), (1, None), (2, None)]
    assert rows.columns == ("text", "label", "day", "parts") and rows.truth_words == ("False", "True")
    with pytest.raises(KeyError):
        next(iter(rows)).columns["other"]


def test_many_rows_come_in_order(written):
    rows = written(pa.table({"n": range(5001), "kind": pa.array(["a", "b", "c"] * 1667).dictionary_encode()}))
    assert [tuple(row.columns.values()) for row in rows] == [(n, "abc"[n % 3]) for n in range(5001)]


ODD = {
    "a map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "months": pa.array([None, (1, 2, 3)], pa.month_day_nano_interval()),
    "the year 30000": pa.array([884541600000, None], pa.timestamp("s")),
    "a zone that is not there": pa.array([0, None], pa.timestamp("s", tz="Nowhere/Land")),
    "a union": pa.UnionArray.from_sparse(
        pa.array([0, 1], pa.int8()), [pa.array(["a", ""]), pa.array([0, 5], pa.int64())]
    ),
    "nanoseconds": pa.array([1, None], pa.duration("ns")),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_column_that_nobody_reads_may_be_of_any_type(kind, tmp_path):
    table = pa.table({"text": ["a", "b"], kind: ODD[kind]})
    write_stream(table, tmp_path / "a.arrow")
    try:
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    except pa.ArrowNotImplementedError:  # parquet has no such type
        (tmp_path / "a.parquet").unlink(missing_ok=True)
    for path in tmp_path.iterdir():
        rows = load_rows(DataSource(path=str(path)))
        assert [row.columns["text"] for row in rows] == ["a", "b"] and rows.columns == ("text", kind)


def test_a_value_that_python_does_not_have_is_named(written):
    rows = written(pa.table({"when": ODD["the year 30000"]}))
    with pytest.raises(DataError, match=r"the values of column when \(timestamp\[.*\]\) cannot be read"):
        next(iter(rows)).columns["when"]


def test_class_names_that_datasets_wrote_count(written):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).data.table
    rows = written(table)
    assert rows.class_names == {"label": ("no", "yes")} and dict(next(iter(rows)).columns) == {"text": "a", "label": 1}
    for odd in (b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        assert written(table.replace_schema_metadata({b"huggingface": odd})).class_names == {}


def test_no_rows(written):
    for table in (pa.table({"text": pa.array([], pa.string())}), pa.table({})):
        with pytest.raises(DataError, match="is empty: expected at least one row"):
            written(table)


def test_a_name_given_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    for suffix in ("parquet", "arrow"):
        WRITERS[suffix](table, tmp_path / f"a.{suffix}")
        with pytest.raises(DataError, match=r"has two columns of the name 'text': rename one"):
            load_rows(DataSource(path=str(tmp_path / f"a.{suffix}")))


def test_what_it_is_shows_whatever_its_name_says(written):
    """pandas' documentation writes parquet under the suffix .parquet.gzip."""
    table = pa.table({"text": ["a"]})
    for name in ("a.parquet.gzip", "a.pq", "a", "a.csv", "x::y.parquet", "zip:", "a[1]*?#%20{a,b}", "-a\nb.parquet"):
        assert [dict(row.columns) for row in written(table, name)] == [{"text": "a"}], name


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"no parquet at all"), ("a.arrow", b"no Arrow file at all")]
)
def test_no_such_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read: expected an? .* Is it complete\?"):
        load_rows(DataSource(path=str(tmp_path / name)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_part_of_a_file_gives_no_rows(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    WRITERS[suffix](pa.table({"text": [f"text {number}" for number in range(999)]}), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match="Is it complete"):
        load_rows(DataSource(path=str(path)))


def test_a_format_that_is_given_is_kept_to(tmp_path):
    WRITERS["parquet"](pa.table({"text": ["a"]}), tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"cannot be read as csv: it is a parquet file: give it the suffix \.parquet"):
        load_rows(DataSource(path=str(tmp_path / "a.csv"), format="csv"))


def test_what_datasets_saves_on_a_disk(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    for path, split in (("one", None), ("two", "test")):
        rows = load_rows(DataSource(path=str(tmp_path / path), split=split))
        assert [dict(row.columns) for row in rows] == [{"text": "a", "label": 1}]
        assert rows.class_names == {"label": ("no", "yes")}
    for path, split, says in (
        ("one", "dev", "holds one data set without splits: leave split out"),
        ("two", None, "has several splits: test, train"),
        ("two", "dev", "has no split 'dev'. The splits there are: test, train"),
    ):
        with pytest.raises(DataError, match=says):
            load_rows(DataSource(path=str(tmp_path / path), split=split))

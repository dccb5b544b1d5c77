"""Local files: every row survives, memory and disk stay clean, and errors name the row."""

import bz2
import csv
import gzip
import lzma
import os
import pickle
import threading
from pathlib import Path

import pytest

from petals_eval.data import DataSource, load_rows
from petals_eval.errors import DataError, MachineError

TREC = r"(?P<label>\S+) (?P<text>.*)"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(rows) -> list[dict]:
    return [dict(row.columns) for row in rows]


def load(path: str, **settings):
    return load_rows(DataSource(path=path, **settings))


def fails(path: str, **settings) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_sst2_row_survives(realdata):
    for name, count in (("dev.tsv", 872), ("train.tsv", 6920)):
        rows = load(str(realdata / "sst2" / name), column_names=["sentence", "label"])
        assert len(rows) == count == len(values(rows))
        assert {row["label"] for row in values(rows)} == {"0", "1"}
    expected = (realdata / "sst2" / "dev.tsv").read_text(encoding="utf-8").split("\n")[0].split("\t")
    first = next(iter(load(str(realdata / "sst2" / "dev.tsv"), column_names=["sentence", "label"])))
    assert [first.columns["sentence"], first.columns["label"]] == expected


def test_trec_lines_are_latin_1(realdata):
    rows = load(str(realdata / "trec" / "TREC.test.all"), pattern=TREC, encoding="latin-1")
    assert (len(rows), rows.name) == (500, "TREC.test.all")
    assert values(rows)[0] == {"label": "5", "text": "How far is it from Denver to Aspen ?"}
    train = load(str(realdata / "trec" / "TREC.train.all"), pattern=TREC, encoding="latin-1")
    assert len(train) == 5452
    assert "sister\xf0city" in values(train)[65]["text"]


def test_only_newline_ends_a_line(tmp_path):
    path = write(tmp_path, "odd", b"1 one\x85two\x0bthree\x1cfour\r\n2 five\rsix\r\n3 seven")
    rows = values(load(path, pattern=TREC.replace(".*", r"(?s:.*)"), encoding="latin-1"))
    assert [row["text"] for row in rows] == ["one\x85two\x0bthree\x1cfour", "five\rsix", "seven"]


def test_quotation_marks_are_characters_in_tsv(tmp_path):
    path = write(tmp_path, "a.tsv", 'he said "no\t0\n"\t1\nNA\t0\nnull\t1\n\t0\n')
    rows = values(load(path, column_names=["sentence", "label"]))
    assert [row["sentence"] for row in rows] == ['he said "no', '"', "NA", "null", ""]


def test_a_header_that_repeats_the_column_names_is_no_row(tmp_path):
    path = write(tmp_path, "a.tsv", "sentence\tlabel\ngood\t1\n")
    assert values(load(path, column_names=["sentence", "label"])) == [{"sentence": "good", "label": "1"}]
    assert values(load(path)) == [{"sentence": "good", "label": "1"}]


def test_csv_is_quoted_and_may_hold_line_ends(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"one, ""two""\nthree",1\n\nfour,0\n')
    assert [row["text"] for row in values(load(path))] == ['one, "two"\nthree', "four"]


def test_csv_with_another_delimiter_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbftext;label\na,b;1\n")
    assert values(load(path, delimiter=";")) == [{"text": "a,b", "label": "1"}]


def test_an_open_quotation_mark_swallows_nothing(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"open,1\nb,0\n')
    message = fails(path)
    assert "not well-formed csv" in message and "set quoting: false" in message
    assert [row["text"] for row in values(load(path, quoting=False))] == ['"open', "b"]


def test_jsonl_and_json_keep_their_types(tmp_path):
    content = '{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}\n'
    assert values(load(write(tmp_path, "a[1].jsonl", content))) == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
    ]
    assert len(load(write(tmp_path, "a.json", '[{"text": "a"}, {"text": "b"}]'))) == 2


def test_real_jsonl(realdata):
    rows = load(str(realdata / "copa" / "dev.jsonl"))
    assert "premise" in rows.columns and len(rows) == len(values(rows)) == 50


def test_lines_without_a_pattern_are_one_column(tmp_path):
    assert values(load(write(tmp_path, "a.txt", "one\n\n two\n"))) == [{"text": "one"}, {"text": " two"}]


def test_a_row_of_delimiters_alone_is_a_row_and_a_blank_line_is_none(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n\nfar,1\n,\n  \n"a\nb",\n\t\nwho,0\n')
    rows = list(load(path))
    assert [dict(row.columns) for row in rows] == [
        {"text": "far", "label": "1"},
        {"text": "", "label": ""},
        {"text": "a\nb", "label": ""},
        {"text": "who", "label": "0"},
    ]
    assert [(row.index, row.line) for row in rows] == [(0, 3), (1, 4), (2, 6), (3, 9)]
    rows = list(load(write(tmp_path, "a.tsv", "text\tlabel\n\t\n  \nwho\t0\n")))
    assert [(row.index, row.line, row.columns["text"]) for row in rows] == [(0, 2, ""), (1, 4, "who")]


def test_rows_of_plain_lines_know_their_lines(tmp_path):
    rows = load(write(tmp_path, "q", "\n1 one\n \n2 two\n"), pattern=TREC)
    assert [(row.index, row.line) for row in rows] == [(0, 2), (1, 4)]


def test_many_rows_come_in_order(tmp_path):
    path = write(tmp_path, "a.tsv", "".join(f"text {number}\t{number % 2}\n" for number in range(7001)))
    rows = load(path, column_names=["text", "label"])
    assert [(row.index, row.columns["text"]) for row in rows] == [(n, f"text {n}") for n in range(7001)]


def test_a_local_file_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    for name, content in (("a.jsonl", '{"text": "a"}\n'), ("a.csv", "text\na\n"), ("a.txt", "a\n")):
        rows = load(write(tmp_path, name, content))
        assert list(cache.iterdir()) == []
        assert values(rows) == [{"text": "a"}]


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: pytest.fail("the hub was asked"))
    for path in (
        "./nothing",
        "nothing.csv",
        str(tmp_path / "nothing"),
        "../nothing",
        "~/nothing-here",
        "~no-such-user/x",
    ):
        message = fails(path)
        assert f"there is no file {path}" in message and "owner/name" in message
    assert "there is no file plain" in fails("plain", format="lines")


def test_a_line_beside_the_pattern_is_named(tmp_path):
    message = fails(write(tmp_path, "q", "1 good\nbad\n" + "x" * 300), pattern=TREC)
    assert "row 1 (line 2) does not match the pattern" in message and "'bad'" in message
    long = fails(write(tmp_path, "q", "x" * 300), pattern=TREC)
    assert "row 0 (line 1)" in long and len(long) < 300


def test_a_row_with_other_columns_is_named(tmp_path):
    message = fails(write(tmp_path, "a.tsv", "a\t1\nb\t0\textra\n"), column_names=["sentence", "label"])
    assert "row 1 (line 2): expected 2 columns (sentence, label), found 3, the last of which holds 'extra'" in message


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "U8", "utf", "cp65001", "utf_8_sig"])
def test_every_name_of_utf_8_knows_the_byte_order_mark(tmp_path, encoding):
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbftext\na\n")
    assert values(load(path, encoding=encoding)) == [{"text": "a"}]


def test_half_of_a_surrogate_pair_is_an_error_with_its_lines(tmp_path):
    path = write(tmp_path, "a.csv", "text\ngood\n\\ud83d\n")
    assert "lines 2 to 3: a text holds '\\ud83d', half of a surrogate pair" in fails(path, encoding="unicode_escape")


def test_a_wrong_encoding_says_so(tmp_path):
    message = fails(write(tmp_path, "q", b"1 caf\xe9 ?\n"), pattern=TREC)
    assert "q is not utf-8" in message and "encoding: latin-1" in message
    assert "q is not punycode: " in fails(write(tmp_path, "q", b"text,label\n"), encoding="punycode")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_an_empty_file(tmp_path, name):
    assert "is empty: expected at least one row" in fails(write(tmp_path, name, ""))


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jsonl"])
def test_a_file_of_blank_lines(tmp_path, name):
    message = fails(write(tmp_path, name, "\n\n"))
    assert "no rows" in message or "is empty" in message


def test_a_header_alone_is_empty(tmp_path):
    assert "is empty" in fails(write(tmp_path, "a.csv", "text,label\n"))


def test_a_header_must_name_each_column_once(tmp_path):
    message = fails(write(tmp_path, "a.csv", "a,x,x\n1,2,3\n"))
    assert "found 'x' twice" in message and "give column_names" in message


def test_a_broken_json_line_is_named(tmp_path):
    message = fails(write(tmp_path, "a.jsonl", '{"text": "a"}\nnot json\n'))
    assert "line 2 is not JSON" in message and "'not json'" in message


def test_datasets_prints_nothing_of_what_it_cannot_read(tmp_path, capfd):
    fails(write(tmp_path, "a.parquet", "no parquet at all, but long enough"))
    fails(write(tmp_path, "a.jsonl", "no json"))
    assert capfd.readouterr() == ("", "")


def test_long_texts_make_small_batches(tmp_path, monkeypatch):
    from petals_eval.data import files

    monkeypatch.setattr(files, "_BATCH_CHARACTERS", 100)
    rows = load(write(tmp_path, "a.csv", "text\n" + "".join(f"{'x' * number}\n" for number in range(1, 90))))
    assert [len(row.columns["text"]) for row in rows] == list(range(1, 90))


def test_a_file_has_no_split(tmp_path):
    message = fails(write(tmp_path, "a.csv", "text\na\n"), split="test", subset="x")
    assert "a file has no subset and no split" in message


def test_a_folder_that_cannot_be_written_is_the_machines_fault(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(blocked / "cache"))
    with pytest.raises(MachineError, match=r"cannot read .* into a table") as caught:
        load(write(tmp_path, "a.csv", "text\na\n"))
    assert caught.value.exit_code == 4


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first = load(write(tmp_path, "a.tsv", "x\t1\n"), column_names=["s", "l"])
    (tmp_path / "other").mkdir()
    same = load(write(tmp_path / "other", "b.tsv", "x\t1\n"), column_names=["s", "l"])
    changed = load(write(tmp_path, "c.tsv", "x\t0\n"), column_names=["s", "l"])
    read_otherwise = load(write(tmp_path, "d.tsv", "x\t1\n"), column_names=["s", "m"])
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, changed.fingerprint, read_otherwise.fingerprint}) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pathh": "x"}, "pathh: unknown key. Did you mean path? Known here: column_names,"),
        ({"pattern": "("}, "pattern: should be a regular expression"),
        ({"pattern": "abc"}, "should have named groups"),
        (
            {"encoding": "latin-99"},
            "encoding: should be an encoding that Python knows, such as utf-8 or latin-1, found",
        ),
        ({"format": "xml"}, "format: should be 'csv', 'tsv', 'jsonl', 'parquet', 'arrow' or 'lines', found 'xml'"),
        ({"delimiter": "::"}, "delimiter: "),
        ({"column_names": ["a", "a"]}, "column_names: should be at least one name, each only once"),
    ],
)
def test_a_wrong_setting_is_named(settings, expected):
    with pytest.raises(DataError) as caught:
        DataSource(**{"path": "x", **settings})
    assert expected in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_source_without_a_path():
    with pytest.raises(DataError, match="path: missing"):
        DataSource.model_validate({})


def test_a_token_is_never_shown():
    source = DataSource(path="a/b", token="hf_secret")
    assert "hf_secret" not in repr(source) + str(source) + source.model_dump_json()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "git lfs pull"),
        ("a.csv.zst", b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
        ("a.csv.lz4", b"\x04\x22\x4d\x18\x00", "compressed with lz4"),
        ("a.xlsx", b"PK\x03\x04\x14\x00", "an Excel workbook"),
        ("a.parquet", b"PK\x03\x04\x14\x00", "an Excel workbook"),
        ("a.csv.gz", gzip.compress(b"PK\x03\x04\x14\x00"), "an Excel workbook"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "compressed with gzip: unpack it first"),
        ("a.arrow.xz", lzma.compress(b"ARROW1"), "compressed with xz: unpack it first"),
        ("a.pkl", pickle.dumps(["a"], protocol=5), "a pickle of Python"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("a.feather", b"FEA1\x00", "a file of the first version of Feather"),
        ("a.tar", b"a.csv".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        ("a.csv.gz", gzip.compress(b"a.csv".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_its_true_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = fails(str(tmp_path / name))
    assert says in message and "encoding" not in message


PACKED = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "b[1]::c.JSON"])
def test_a_compressed_file_is_what_was_compressed(tmp_path, suffix, pack, name):
    content = b'{"text": "a"}\n{"text": "b"}\n' if "JSON" in name.upper() else b"text\na\n\nb\n"
    plain, packed = load(write(tmp_path, name, content)), load(write(tmp_path, f"{name}.{suffix}", pack(content)))
    assert [(row.line, row.columns) for row in packed] == [(row.line, row.columns) for row in plain]
    assert packed.fingerprint == plain.fingerprint
    # Of another name and compressed all the same.
    assert values(load(write(tmp_path, name, pack(content)))) == values(plain)


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
def test_half_of_a_compressed_file(tmp_path, suffix, pack):
    whole = pack("".join(f"text {number}\n" for number in range(9000)).encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:12], bytes(damaged)):
        message = fails(write(tmp_path, f"a.csv.{suffix}", content))
        assert f"a.csv.{suffix} cannot be unpacked" in message and "Is it complete?" in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_lines_of_an_old_mac(tmp_path, name, encoding):
    path = write(tmp_path, name, "text\rcaf\xe9\r\r b\r".encode(encoding))
    rows = list(load(path, encoding=encoding, format="csv" if name == "a.txt" else None))
    assert [(row.line, row.columns["text"]) for row in rows] == [(2, "caf\xe9"), (4, " b")]
    if name == "a.txt":
        assert [row.columns["text"] for row in load(path, encoding=encoding)] == ["text", "caf\xe9", " b"]


def test_a_carriage_return_within_a_line_is_named(tmp_path):
    message = fails(write(tmp_path, "a.csv", "text,label\na,1\nb\rc,0\n"))
    assert "line 3 is not well-formed csv: a carriage return (\\r) stands outside of quotation marks" in message
    assert values(load(write(tmp_path, "a.csv", 'text,label\n"b\rc",0\n'))) == [{"text": "b\rc", "label": "0"}]
    # The first line end may come late.
    late = load(write(tmp_path, "a.csv", '"' + "x\r" * 800_000 + '"\na\n'))
    assert [row.columns for row in late] == [{"x\r" * 800_000: "a"}]


def test_a_field_of_any_length_is_a_field_and_the_programs_own_limit_stays(tmp_path, monkeypatch):
    before = csv.field_size_limit()
    for name, huge in (("a.csv", "x" * 1_000_000), ("a.csv", '"' + "y\n" * 300_000 + '"'), ("a.tsv", "z" * 1_000_000)):
        [row] = load(write(tmp_path, name, f"text\n{huge}\n"))
        assert row.columns["text"] == huge.strip('"')
    assert csv.field_size_limit() == before
    from petals_eval.data import files

    monkeypatch.setattr(files, "_MAX_FIELD", 100)
    message = fails(write(tmp_path, "a.csv", 'text\na\n"' + "b\n" * 99))
    assert "a field has more than 100 characters; the row begins in line 3. If quotation marks" in message
    assert csv.field_size_limit() == before


def test_an_open_quotation_mark_is_said_with_the_line_of_its_row(tmp_path):
    message = fails(write(tmp_path, "a.csv", 'text\na\n"b\nc\nd\n'))
    assert "the file ends within quotation marks, of the row that begins in line 3" in message


def test_files_can_be_read_by_several_threads(tmp_path):
    found = []
    path = write(tmp_path, "a.csv", "text\n" + "x" * 500_000 + "\n")
    threads = [threading.Thread(target=lambda: found.append(len(load(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 4


def test_blank_lines_of_plain_text_are_left_out_and_counted(tmp_path):
    rows = load(write(tmp_path, "a.txt", "one\n\n \t\ntwo\n\n"))
    assert values(rows) == [{"text": "one"}, {"text": "two"}]
    assert rows.notes == ("a.txt: 3 blank lines left out: a blank line is no row",)
    assert load(write(tmp_path, "a", "1 a\n\n"), pattern=TREC).notes == (
        "a: 1 blank line left out: a blank line is no row",
    )
    assert load(write(tmp_path, "a.txt", "one\n")).notes == ()


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device, and the rows are read more than once" in fails(str(tmp_path / "pipe"))

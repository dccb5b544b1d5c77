"""The file of --config: its keys are the flags, and its values mean what is written there."""

from pathlib import Path

import pytest

from petals_eval.cli.flags import keys_of
from petals_eval.cli.run import read_settings
from petals_eval.config import RunSettings
from petals_eval.errors import ConfigError

BASE = "model: m\ntask: t\nlocal-swarm: 1\n"


def settings_of(folder: Path, text: str, **flags) -> RunSettings:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path, flags)


def fails(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings_of(folder, text)
    return str(caught.value)


@pytest.mark.parametrize("written", ["0012345", "2024_01", "1e3", "on", "no", "00", "2020-01-01", "1:30", "0x1F", ".5"])
def test_texts_are_what_is_written(tmp_path, written):
    names = ("model", "revision", "task", "data", "subset", "split", "data-revision", "dht-prefix", "out", "device")
    lists = ("adapter", "allow-server", "fail-under", "fail-over")
    text = "".join(f"{name}: {written}\n" for name in names) + "".join(f"{name}: [{written}, x]\n" for name in lists)
    found = settings_of(tmp_path, f"{text}token: {written}\nlocal-swarm: 1\n")
    assert {getattr(found, name.replace("-", "_")) for name in names} == {written}
    assert {getattr(found, keys_of(RunSettings)[name.replace("-", "_")]) for name in lists} == {(written, "x")}
    assert found.token is not None and found.token.get_secret_value() == written
    assert settings_of(tmp_path, f"{BASE}adapter: {written}\n").adapter == (written,)


def test_numbers_truth_values_and_blocks_are_made_of_text(tmp_path):
    found = settings_of(
        tmp_path,
        "--model: m\ntask: t\nlocal-swarm: 3\nmax_length: 96\nverify-local: 1:3\nverify: .5\ndeadline: 1e2\n"
        "json: true\nwithout-prompts: yes\nseed: 010\nlimit: null\nsubset: ~\nwindow:\nshard: 2/3\n",
    )
    assert (found.local_swarm, found.max_length, found.verify_local) == (3, 96, (1, 3))
    assert (found.verify, found.deadline, found.json_output, found.without_prompts) == (0.5, 100.0, True, True)
    assert (found.seed, found.limit, found.subset, found.window, found.shard) == (10, None, None, None, "2/3")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("limit: 1e2", "limit: expected a whole number (found '1e2')"),
        ("limit: 1:30", "limit: expected a whole number (found '1:30')"),
        ("deadline: 1:30", "deadline: expected a number (found '1:30')"),
        ("json: maybe", "json: expected true or false (found 'maybe')"),
        ("verify-local: 3:1", "verify_local: expected blocks FIRST:LAST with 0 <= FIRST < LAST (found '3:1')"),
        ("adapter: null", "adapter: expected a list"),
        ("adapter:\n-\n", "adapter.0: expected a path, a hub name, or NAME=PATH"),
        ("model:", "is given twice"),
        (
            "max-length: 8\nmax_length: 9",
            "line 5: not valid YAML: the key 'max_length' is given twice, here and in line 4",
        ),
        ("--limit: 8\nlimit: 9", "line 5: not valid YAML: the key 'limit' is given twice, here and in line 4"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path, line, expected):
    assert expected in fails(tmp_path, f"{BASE}{line}\n")


def test_a_key_with_nothing_behind_it_is_no_empty_text(tmp_path):
    """An empty path would be the folder where one is."""
    assert "model: expected text (found None)" in fails(tmp_path, "model:\ntask: t\nlocal-swarm: 1\n")


def test_a_flag_wins_over_the_file_however_the_key_is_written(tmp_path):
    assert settings_of(tmp_path, f"{BASE}--max-length: 8\n", max_length=9).max_length == 9

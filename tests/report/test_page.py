"""The page of a run: complete for each kind of task, true to its state, and strangers' words are text alone."""

import html
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from petals_eval.comparison.compare import compare
from petals_eval.report.comparison_page import comparison_page
from petals_eval.report.page import command_of
from petals_eval.report.write import write_comparison, write_page
from petals_eval.runs import RunFolder
from petals_eval.runs.manifest import DataRecord, NoisyServer, ServerUsed
from tests.report.pages import HOSTILE, METRICS, run_folder
from tests.runs.samples import manifest

PLOTS = {
    "classification": ["accuracy", "Calibration", "By label", "By length", "Margin"],
    "choice": ["acc", "By length", "Likelihood", "Margin"],
    "perplexity": ["token perplexity", "By length", "By position", "Likelihood"],
    "generation": ["exact match [word]", "By length", "Length of texts"],
    "continuation": ["acc", "By length", "Likelihood"],
    "regression": ["mean squared error", "By length", "Errors"],
}


class Tags(HTMLParser):
    """What a browser takes for markup: tags, the names of attributes, and the places that they name."""

    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.places: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.places |= {value or "" for name, value in attrs if name in ("href", "src", "xlink:href")}


def page_of(folder: Path) -> str:
    return write_page(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", METRICS)
def test_each_kind_of_task_has_its_numbers_and_plots(kind: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", kind)
    found = page_of(folder)
    assert re.findall(r"<figure><h3>([^<]*)</h3>", found) == PLOTS[kind]
    with RunFolder.open(folder) as opened:
        value = next(iter(opened.result().metrics.values())).value
    assert f"<b>{value:.4f}</b>" in found
    assert "every example is scored" in found
    assert found.count("<svg") == len(PLOTS[kind])
    assert not re.search(r"#00000[1-5]\b", found)  # each colour is one of the page's


def test_no_two_plots_share_a_name_that_is_referred_to(tmp_path: Path) -> None:
    found = page_of(run_folder(tmp_path / "run"))
    names = re.findall(r' id="([^"]+)"', found)
    assert len(names) == len(set(names)) > 0
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', found))
    assert referred <= set(names)


def test_words_of_strangers_are_text_wherever_they_stand(tmp_path: Path) -> None:
    servers = (ServerUsed(HOSTILE, 0, 5, HOSTILE, HOSTILE, HOSTILE),)
    folder = run_folder(
        tmp_path / "run", labels=(HOSTILE, "no"), adapters=(HOSTILE.replace("/", "|")[:90], "plain"), servers=servers,
        noisy=(NoisyServer(HOSTILE, 0, 5, HOSTILE, 0.5, True),),
    )  # fmt: skip
    for found in (page_of(folder), comparison_page(compare(folder), texts={str(key): HOSTILE for key in range(200)})):
        tags = Tags(found)
        assert tags.names.isdisjoint({"script", "img", "iframe", "object", "form", "a"})
        assert not [name for name in tags.attributes if name.startswith("on")]
        assert tags.places <= {"data:,"} | {place for place in tags.places if place.startswith("#")}
        assert "\u202e" not in found
        assert "&lt;script&gt;" in found
        assert "default-src &#39;none&#39;" in found or "default-src 'none'" in found


@pytest.mark.parametrize(
    ("changes", "said", "state"),
    [
        ({"finished": False, "failed": 20}, "Not finished: 100 of 120 examples are scored", "bad"),
        ({"failed": 1}, "1 example failed: the numbers are of the others alone", "warn"),
        (
            {"noisy": (NoisyServer("12D3KooWBeta", 3, 5, None, 0.25, True, "disputed"),)},
            "In doubt: 1 server that took part do not agree",
            "bad",
        ),
        (
            {"noisy": (NoisyServer("12D3KooWBeta", 3, 5, None, 0.25, True),)},
            "Not reproducible: 1 server in training mode took part",
            "bad",
        ),
    ],
    ids=["interrupted", "failures", "disputed", "training mode"],
)
def test_the_first_sentence_says_whether_to_rely_on_it(changes: dict, said: str, state: str, tmp_path: Path) -> None:
    found = page_of(run_folder(tmp_path / "run", **changes))
    sentence = re.search(r'<p class="state (\w+)">([^<]*)</p>', found)
    assert sentence is not None
    assert sentence[1] == state
    assert sentence[2].startswith(said)


def test_a_run_without_a_scored_example_has_a_page(tmp_path: Path) -> None:
    found = page_of(run_folder(tmp_path / "run", finished=False, failed=120))
    assert "0 of 120 examples are scored" in found
    assert "<svg" not in found


def test_the_command_repeats_the_run_by_the_names_that_it_keeps(tmp_path: Path) -> None:
    found = html.unescape(page_of(run_folder(tmp_path / "run", adapters=("first", "second; rm -rf"))))
    assert (
        "petals-eval run --model stories260K-hf --adapter first --adapter 'second; rm -rf' --task "
        "'<your task file classification.yaml>' --data test.txt --dtype float32 --initial-peers '<address of a peer>'"
        in found
    )


@pytest.mark.parametrize(
    ("task", "data", "swarm", "said"),
    [
        ("sst2", "nyu-mll/glue sst2 validation", {"local_swarm": 3}, "--task sst2 --dtype float32 --local-swarm 3"),
        ("sst2", "my.csv", {"public_swarm": True}, "--task sst2 --data my.csv --dtype float32 --public-swarm"),
        (
            "mine",
            "nyu-mll/glue sst2 validation",
            {"local_swarm": None, "public_swarm": False},
            "--task '<your task file mine.yaml>' --data '<your data nyu-mll/glue sst2 validation>' --dtype float32 "
            "--initial-peers '<address of a peer>'",
        ),
    ],
)
def test_the_command_says_what_the_run_knows(task: str, data: str, swarm: dict, said: str) -> None:
    made = manifest(task={"name": task}, data=DataRecord(name=data, fingerprint="cc" * 32), run_settings=swarm)
    assert command_of(made).endswith(f"--adapter trec-ptune {said}")


def test_a_comparison_shows_differences_and_changed_rows_by_key(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, adapters=adapters) for name, adapters in (("a", ("x",)), ("b", ("x", "y")))]
    found = write_comparison(folders, tmp_path / "comparison.html").read_text()
    assert found.count("<figure>") == 2  # accuracy and F1: the calibration error has no interval
    assert "Rows whose prediction changed: " in found
    assert 'class="text"' not in found
    with_texts = comparison_page(compare(*folders), texts={str(key): f"text {key}" for key in range(120)})
    assert re.search(r'<tr class="text"><td></td><td colspan="4">text \d+</td>', with_texts)


@pytest.mark.soak
def test_a_page_of_100_000_rows_is_small_and_soon_there(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rows=100_000, labels=[f"label {number}" for number in range(20)])
    began = time.monotonic()
    size = write_page(folder).stat().st_size
    assert size < 2e6
    assert time.monotonic() - began < 10

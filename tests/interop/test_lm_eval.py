"""Our numbers are those of lm-evaluation-harness 0.4.13, its own backend `hf`, on the same weights, rows and templates.

Its side is computed once, in a process of its own; ours over a local swarm, and a part of it over real Petals servers.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import petals_eval
from petals_eval.tasks import Task, load_task
from petals_eval.tasks.prompted import PromptedTask
from tests.interop.conftest import BOUNDED
from tests.interop.lm_eval_tasks import BOS, COUNTERPARTS, OWN, ROWS, bos_of
from tests.support.real_swarm import STORIES, predictions, stories_swarm

pytestmark = pytest.mark.timeout(600)  # the harness computes everything before the first of them

LIKELIHOOD_ERROR = 1e-4  # of a choice or a continuation, in nats
DOCUMENT_ERROR = 1e-6  # of a document, of its value
CASES = [(name, bos) for name in (*OWN, *COUNTERPARTS) for bos in bos_of(name)]


@dataclass(frozen=True)
class Ours:
    """A run: its predictions line by line, the texts that it generated, and its metrics."""

    lines: list[dict[str, Any]]
    texts: list[str]
    metrics: dict[str, float | None]


@pytest.fixture(scope="module")
def model(realdata) -> Iterator[petals_eval.RemoteModel]:
    with (
        stories_swarm(realdata, [(0, 3), (3, 5)]) as swarm,
        petals_eval.RemoteModel.from_pretrained(
            str(realdata / STORIES), initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix
        ) as remote,
    ):
        yield remote


def task_of(name: str, bos: str, folder: Path) -> Task:
    if name in OWN:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(OWN[name].ours | {"bos": bos}))
        return load_task(folder / f"{name}.yaml")
    settings = COUNTERPARTS[name].overrides.get("generation_kwargs")
    changes = {} if settings is None else {"max_new_tokens": settings["max_gen_toks"]}
    task = load_task(name)
    assert isinstance(task, PromptedTask)
    return task.model_copy(update={"bos": bos, **changes})


def run(model: petals_eval.RemoteModel, name: str, bos: str, own_rows: dict[str, Path], folder: Path) -> Ours:
    rows = own_rows[name] if name in OWN else ROWS / COUNTERPARTS[name].rows
    task = task_of(name, bos, folder)
    shots = COUNTERPARTS[name].shots if name in COUNTERPARTS else None
    result = petals_eval.evaluate(
        model,
        task=task,
        data=rows,
        out=folder / "run",
        shots_data=None if shots is None else str(ROWS / shots),
        save_texts=task.kind == "generation",
    )
    assert (result.first.n_failed, result.first.n_unlabelled) == (0, 0)
    file = folder / "run" / "texts.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()] if file.exists() else []
    metrics = {key: metric.value for key, metric in result.first.metrics.items()}
    return Ours(predictions(folder / "run"), texts, metrics)


def check(name: str, ours: Ours, theirs: dict[str, Any]) -> None:
    """Hold every number of a run against the harness's."""
    answers = theirs["answers"]
    if ours.texts:
        assert ours.texts == [text for [text] in answers]
    elif isinstance(answers[0][0], list):
        assert len(ours.lines) == len(answers)
        for line, row in zip(ours.lines, answers, strict=True):
            found = as_list(line["log_likelihood"]) + line.get("unconditioned", [])
            assert found == pytest.approx([likelihood for likelihood, _ in row], abs=LIKELIHOOD_ERROR)
            if "is_greedy" in line:
                assert bool(line["is_greedy"]) is row[0][1]
    else:
        found = [line["log_likelihood"] for line in ours.lines]
        assert found == pytest.approx([likelihood for [likelihood] in answers], rel=DOCUMENT_ERROR)
    table = OWN[name].metrics if name in OWN else COUNTERPARTS[name].metrics
    assert len(theirs["metrics"]) >= len(table)
    for key, value in theirs["metrics"].items():
        metric, _, kind = key.partition(",")
        own = ours.metrics[table.get(key, table.get(metric, ""))]
        assert is_same(own, value), f"{metric} ({kind}): ours {own}, theirs {value}"


def is_same(own: float, value: float) -> bool:
    """Whether both are printed alike, with four digits behind the point.

    The perplexity of a text that is very unlike what the model was trained on has more digits than a float32, in which
    the harness adds up: of it what a document's likelihood tells.
    """
    if value < 1000:
        return f"{own:.4f}" == f"{value:.4f}"
    return math.isclose(own, value, rel_tol=DOCUMENT_ERROR * math.log(value))


def as_list(values: float | list[float]) -> list[float]:
    return values if isinstance(values, list) else [values]


@pytest.mark.parametrize(("name", "bos"), CASES)
def test_every_number_is_the_harnesss(name, bos, model, lm_eval, own_rows, tmp_path):
    check(name, run(model, name, bos, own_rows, tmp_path), lm_eval[name]["by_bos"][str(BOS[bos])])


@pytest.mark.parametrize("name", ["copa_questions", "lambada", "wikitext", "stories_continued"])
def test_every_number_through_real_petals_servers(name, stories, lm_eval, own_rows, realdata, tmp_path):
    with petals_eval.RemoteModel.from_pretrained(
        str(realdata / STORIES), initial_peers=stories.initial_peers, dht_prefix=STORIES, **BOUNDED
    ) as remote:
        bos = bos_of(name)[0]
        check(name, run(remote, name, bos, own_rows, tmp_path), lm_eval[name]["by_bos"][str(BOS[bos])])

"""Results in experiment trackers: names that they take, and nothing lost where one is missing or fails."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from petals_eval import tracking
from petals_eval.errors import ConfigError
from petals_eval.metrics import Metric
from petals_eval.runs import AdapterResult, NumericalNoise, RunResult
from petals_eval.tracking import Tracker, log_results, logged_settings, logged_values, trackers, trackers_of
from tests.cli.invoking import invoke
from tests.fake_model import FakeModel, evaluate, write_rows
from tests.tracking.real_trackers import manifest, result_of

ROOT = Path(__file__).resolve().parents[2]
ACCURACY = [[0, 0.5], [1, 0.625], [2, 0.75]]


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_names_are_taken_by_every_tracker_and_no_two_become_one():
    metrics = {f"f1[{label}]": Metric(f"f1[{label}]", 0.5) for label in ("a b", "a?b", "a_b", "", "..", "ü" * 300, "/")}
    found = AdapterResult("../prompts v2", 8, 0, 0, 80, 2.0, metrics, (), (), noise=NumericalNoise(0.1, 2, 0.25))
    values = logged_values(RunResult("my task", {"../prompts v2": found, "b": replace(found, adapter="b")}))
    names = [name for name in values if name.startswith("my_task/_prompts_v2/f1/")]
    assert len(names) == len(metrics)
    assert {"my_task/_prompts_v2/f1/a_b", "my_task/_prompts_v2/f1/a_b_2", "my_task/_prompts_v2/f1/a_b_3"} <= set(names)
    assert values["my_task/b/unsure_share"] == 0.25
    for name in values:
        # MLflow takes letters, digits and `_-. :/`, but no empty part and none that is a path's; TensorBoard makes _ of
        # the rest.
        assert re.fullmatch(r"[\w./-]{1,250}", name), name
        assert not {"", ".", ".."} & set(name.split("/")), name


def test_what_is_logged_is_all_that_has_a_value():
    assert logged_values(result_of()) == {
        "trec/accuracy": 0.75,
        "trec/accuracy_low": 0.7,
        "trec/accuracy_high": 0.8,
        "trec/f1/entity": 0.5,
        "trec/f1/wo_bin_ich_.._": 0.25,
        "trec/rows": 8.0,
        "trec/failed": 0.0,
        "trec/seconds": 2.0,
        "trec/examples_per_second": 4.0,
    }
    assert logged_settings(manifest())["adapters"] == "prompts (ptune, bb)"
    assert "limit" not in logged_settings(manifest())


def test_trackers_are_named_with_a_place_or_without(all_installed):
    assert trackers_of(None) == ()
    assert trackers_of("wandb") == (Tracker("wandb"),)
    assert trackers_of(["mlflow=my experiment", "trackio="]) == (Tracker("mlflow", "my experiment"), Tracker("trackio"))
    for wrong in ("comet", "", "=x", 3):
        with pytest.raises(ConfigError, match="--log-to: expected one of wandb, trackio, mlflow, tensorboard"):
            trackers_of([wrong])


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_missing_package_is_told_before_anything_is_sent(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    model = FakeModel()
    with pytest.raises(
        ConfigError, match=rf"found none installed. Install it with: pip install 'petals-eval\[{name}\]'"
    ):
        evaluate(model, write_rows(tmp_path / "rows.csv"), tmp_path / "run", log_to=name)
    assert model.sent == [] and not (tmp_path / "run").exists()
    outcome = invoke("run", "--model", "m", "--task", "sst2", "--local-swarm", "1", "--log-to", name)
    assert outcome.code == 2 and f"petals-eval[{name}]" in outcome.err and "Traceback" not in outcome.err


def test_a_tracker_that_fails_loses_nothing(tmp_path, monkeypatch, caplog, all_installed):
    def fails(*args):
        print("a greeting")
        raise RuntimeError("no network")

    kinds = {"wandb": trackers._Kind("wandb", "project", fails)}
    monkeypatch.setattr(trackers, "TRACKERS", kinds)
    result = evaluate(FakeModel(), write_rows(tmp_path / "rows.csv"), tmp_path / "run", log_to="wandb")
    assert result.first.n_scored == 6 and (tmp_path / "run" / "metrics.json").exists()
    assert "numbers could not be logged to wandb: RuntimeError: no network" in caplog.text


def test_nothing_is_printed_among_json(capsys, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", trackers._Kind("json", "project", lambda *args: print("hello")))
    log_results([Tracker("wandb")], [(result_of(), manifest())], say=pytest.fail)
    assert capsys.readouterr() == ("", "hello\n")


def test_several_tasks_are_logged_together(monkeypatch):
    logged = []
    monkeypatch.setitem(
        trackers.TRACKERS, "wandb", trackers._Kind("json", "project", lambda *args: logged.append(args))
    )
    other = RunResult("sst2", result_of().adapters)
    log_results([Tracker("wandb")], [(result_of(), manifest()), (other, manifest())], step=7, say=pytest.fail)
    [(_, values, settings, step)] = logged
    assert {"trec/accuracy", "sst2/accuracy"} <= set(values) and step == 7
    assert settings["task"] == "trec, sst2"


@pytest.mark.parametrize(
    "name",
    ["tensorboard", *(pytest.param(name, marks=pytest.mark.soak) for name in ("wandb", "trackio", "mlflow"))],
)
def test_the_real_tracker_holds_what_was_logged(tmp_path, name):
    """Offline: what a run of its own holds, and one that was open."""
    python = sys.executable if name == "tensorboard" else str(ROOT / ".venv-trackers" / "bin" / "python")
    if not Path(python).exists():
        pytest.fail("there is no .venv-trackers: run scripts/trackers_environment.sh")
    command = [python, "-W", "ignore", "-m", "tests.tracking.real_trackers", name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])  # Trackio greets in the lines before
    expected = logged_values(result_of())
    own = {each: series[0][1] for each, series in held["own"].items()}
    assert own == pytest.approx(expected, rel=1e-6)
    assert held["open"]["trec/accuracy"] == ACCURACY
    assert held["open"].keys() - {"trec/step"} == expected.keys()


def test_each_epoch_is_a_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = write_rows(tmp_path / "rows.csv")
    for epoch in range(2):
        evaluate(FakeModel(), source, None, log_to=f"tensorboard={tmp_path / 'logs'}", log_step=epoch)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("tiny/accuracy")] == [(0, 0.5), (1, 0.5)]


def test_a_line_says_where_the_numbers_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    logged = [(result_of(), manifest())]
    log_results([Tracker("tensorboard")], logged, say=pytest.fail, say_where=told.append)
    log_results([Tracker("tensorboard", "my logs")], logged, say=pytest.fail, say_where=told.append)
    assert told == [
        "logged: tensorboard, folder petals-eval (tensorboard --logdir petals-eval)",
        "logged: tensorboard, folder my logs (tensorboard --logdir 'my logs')",
    ]
    assert (tmp_path / "petals-eval").is_dir() and (tmp_path / "my logs").is_dir()

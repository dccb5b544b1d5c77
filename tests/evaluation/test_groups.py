"""Groups of tasks: one folder each, the means over all of them, and no task computed twice."""

import json
from types import SimpleNamespace

import pytest

import petals_eval
from petals_eval.errors import AdapterError, ConfigError, DeadlineError, RunFolderError
from petals_eval.runs import RunFolder
from petals_eval.tasks import ClassificationTask, TaskGroup
from tests.fake_model import FakeModel, fake_adapter, write_rows


def task(name, tmp_path, rows, **changes):
    source = write_rows(tmp_path / f"{name}.csv", (1,) * rows)
    values = {"text": "{text}", "label_column": "label", "label_names": ("bad", "good"), "metrics": ("accuracy", "mcc")}
    return ClassificationTask(**{"name": name, "data": source, **values, **changes})


@pytest.fixture
def group(tmp_path):
    """Two tasks, of 3 rows (of which the model has 2 right) and of 6 (3 right)."""
    return TaskGroup("both", (task("one", tmp_path, 3), task("other one", tmp_path, 6)))


def test_each_task_has_a_folder_and_the_group_the_means(group, tmp_path):
    result = petals_eval.evaluate(FakeModel(), task=group, out=tmp_path / "out")
    assert list(result.tasks) == ["one", "other one"]
    means = result.means("no prompts")
    assert means["accuracy"].over_tasks == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert means["accuracy"].over_rows == pytest.approx(5 / 9)
    for name, count in (("one", 3), ("other-one", 6)):
        with RunFolder.open(tmp_path / "out" / name) as folder:
            assert folder.journal.counts("no prompts").scored == count
            assert folder.manifest.finished is not None
    saved = json.loads((tmp_path / "out" / "group.json").read_text())
    assert saved["group"] == "both"
    assert saved["means"]["no prompts"]["accuracy"]["over_rows"] == means["accuracy"].over_rows
    assert saved["tasks"]["one"] == json.loads((tmp_path / "out" / "one" / "metrics.json").read_text())
    assert "mean: accuracy 0.5833 (0.5556 over rows)" in str(result)


def test_without_a_folder_nothing_is_kept(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert petals_eval.evaluate(FakeModel(), task=group).tasks["one"].first.n_scored == 3
    assert sorted(tmp_path.iterdir()) == before


def test_every_prediction_is_in_the_results_of_finished_tasks_too(group, tmp_path):
    def found(result):
        return {name: [(each.key, each.prediction) for each in of.predictions] for name, of in result.tasks.items()}

    result = petals_eval.evaluate(FakeModel(), task=group, out=tmp_path / "out")
    assert found(result) == {"one": [(str(key), 1) for key in range(3)], "other one": [(str(k), 1) for k in range(6)]}
    assert found(petals_eval.evaluate(FakeModel(), task=group, out=tmp_path / "out")) == found(result)


def test_metrics_that_all_tasks_have(tmp_path):
    tasks = (task("one", tmp_path, 3), task("two", tmp_path, 3, metrics=("accuracy", "f1_per_class", "brier")))
    result = petals_eval.evaluate(FakeModel(), task=TaskGroup("g", tasks))
    assert result.metric_names == ("accuracy", "majority_baseline")
    named = petals_eval.evaluate(FakeModel(), task=TaskGroup("g", tasks, metric="log_loss"))
    assert named.metric_names == ("log_loss",)
    assert "accuracy" in named.tasks["one"].metrics


def test_a_group_goes_on_where_it_stopped_and_computes_nothing_twice(group, tmp_path):
    quiet = petals_eval.evaluate(FakeModel(), task=group, out=tmp_path / "quiet")
    stopped = FakeModel(until=5)  # of each task
    with pytest.raises(DeadlineError):
        petals_eval.evaluate(stopped, task=group, out=tmp_path / "out")
    assert not (tmp_path / "out" / "group.json").exists()
    again = FakeModel()
    result = petals_eval.evaluate(again, task=group, out=tmp_path / "out")
    assert [key for key, _ in again.sent] == ["5"]
    assert result.means("no prompts") == quiet.means("no prompts")
    idle = FakeModel()
    assert petals_eval.evaluate(idle, task=group, out=tmp_path / "out").to_json() == result.to_json()
    assert idle.sent == []


def test_a_finished_task_of_other_settings_is_not_taken_for_this_one(group, tmp_path):
    petals_eval.evaluate(FakeModel(), task=group, out=tmp_path / "out")
    with pytest.raises(RunFolderError, match=r"finished run in .*one to be this one; found another"):
        petals_eval.evaluate(FakeModel(require_dtype="float32"), task=group, out=tmp_path / "out")


def test_progress_goes_on_from_task_to_task(group, tmp_path):
    seen = []
    progress = SimpleNamespace(
        update=lambda done, retries=0, servers=0, message=None: seen.append(done), waiting=lambda message: None
    )
    petals_eval.evaluate(FakeModel(), task=group, progress=progress)
    assert seen == sorted(seen)
    assert seen[-1] == 9


def test_a_mistake_in_the_last_task_shows_before_the_first_is_computed(tmp_path):
    model = FakeModel()
    model.local.class_outputs = lambda adapter: 2
    tasks = (task("one", tmp_path, 3), task("two", tmp_path, 3, label_names=("bad", "good", "neither")))
    with pytest.raises(AdapterError, match=r"task two has 3 labels") as refused:
        petals_eval.evaluate(model, task=TaskGroup("g", tasks), out=tmp_path / "out")
    assert "This concerns task two of group g." in refused.value.__notes__[0]
    assert model.sent == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"data": "rows.csv"}, {"shard": "1/2"}])
def test_what_a_group_cannot_have(group, options):
    [name] = options
    with pytest.raises(ConfigError, match=f"{name}: not for all tasks of group both together"):
        petals_eval.evaluate(FakeModel(), task=group, **options)


def test_several_adapters_have_means_of_their_own(group):
    adapters = [fake_adapter("first"), fake_adapter("second")]
    result = petals_eval.evaluate(FakeModel(adapters=adapters), task=group)
    assert result.adapters == ("first", "second")
    assert result.means("second")["accuracy"].over_rows == pytest.approx(5 / 9)


def test_draws_of_shots_in_a_group(tmp_path):
    tasks = tuple(task(name, tmp_path, 12, shots={"count": 2, "split": "train"}) for name in ("one", "two"))
    for name in ("one", "two"):
        write_rows(tmp_path / f"{name}.csv", range(1, 13))  # of which none is equal to a shot
    result = petals_eval.evaluate(FakeModel(), task=TaskGroup("g", tasks), draws=2)
    assert [len(each.first.draws) for each in result.tasks.values()] == [2, 2]
    values = [each.metrics["accuracy"].value for each in result.tasks.values()]
    assert result.means("no prompts")["accuracy"].over_tasks == pytest.approx(sum(values) / 2)

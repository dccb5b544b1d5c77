"""The metadata of a model card: the hub's own classes read it back."""

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import petals_eval
from tests.cli.invoking import invoke
from tests.comparison.test_compare import run
from tests.fake_model import FakeModel, evaluate, write_rows


def test_the_hub_reads_every_metric_back(tmp_path):
    run(tmp_path / "run", "a_1", "b")
    outcome = invoke("show", tmp_path / "run", "--model-card")
    assert outcome.code == 0
    card = ModelCard(outcome.out)
    result = petals_eval.load_runs(tmp_path)
    named, results = model_index_to_eval_results(yaml.safe_load(outcome.out.strip("-\n"))["model-index"])
    found = {each.metric_name: each for each in results}
    assert named == "a_1"
    assert found["accuracy"].metric_value == pytest.approx(result["accuracy"][0])
    assert found["accuracy"].task_type == "text-classification" and found["accuracy"].metric_args is None
    assert "majority baseline" not in found and not any("[" in name for name in found)
    assert card.data.to_dict()["model-index"]


def test_averages_and_names_are_the_hubs(tmp_path):
    task = {"text": "{text}", "label_column": "label", "label_names": ["bad", "good"], "metrics": ["f1_macro", "mcc"]}
    evaluate(FakeModel(), write_rows(tmp_path / "rows.csv"), tmp_path / "run", task=task)
    data = petals_eval.model_card_data(tmp_path / "run", model_name="me/my-prompts")
    assert data.model_name == "me/my-prompts"
    assert [(each.metric_type, each.metric_args) for each in data.eval_results] == [
        ("f1", {"average": "macro"}),
        ("matthews_correlation", None),
    ]
    outcome = invoke("show", tmp_path / "run", tmp_path / "run", "--model-card")
    assert outcome.code == 2 and "expected one run folder, found several" in outcome.err

"""The callback of transformers' Trainer: an evaluation after each epoch, in its log, and the training as without it."""

import json
import subprocess
import sys
from types import MethodType

import pytest
import torch
from transformers import Trainer, TrainingArguments

import petals_eval
from petals_eval.errors import ConfigError
from petals_eval.integrations.trainer import EvaluationCallback
from petals_eval.local_swarm import LocalSwarm
from tests.support.live_models import live_model
from tests.support.tiny_models import make_tiny

LABELS = 3
TASK = petals_eval.ClassificationTask(name="own", text="{text}", label_column="label", label_names=("a", "b", "c"))
ROWS = [{"text": text, "label": index % LABELS} for index, text in enumerate(["good", "the bad", "no yes", "is it"])]
EXAMPLES = [{"input_ids": [index, 1], "labels": index % LABELS} for index in range(8)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=2, labels=LABELS)
    with LocalSwarm(folder, servers=1, dht_prefix="tiny", mode="thread") as swarm:
        yield folder, swarm


def forward(self, input_ids=None, labels=None, **_):
    """Something that prompts and head are trained by: the client's own way to the swarm is not here."""
    noisy = torch.nn.functional.dropout(self.transformer.prompt_embeddings.weight, 0.2, self.training).mean(0)
    logits = self.score(noisy).expand(len(labels), -1)
    return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(served, folder, **options):
    tiny, swarm = served
    torch.manual_seed(3)
    model = live_model(
        tiny, labels=LABELS, initial_peers=swarm.initial_peers, dht_prefix="tiny", tuning_mode="ptune", pre_seq_len=4
    )
    model.forward = MethodType(forward, model)
    model.requires_grad_(False)
    for part in (model.transformer.prompt_embeddings, model.score):
        part.requires_grad_(True)
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "use_cpu": True}
    arguments |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    trainer = Trainer(model=model, args=TrainingArguments(str(folder), **arguments), train_dataset=EXAMPLES)
    callback = EvaluationCallback(trainer, **options)
    if options:
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def test_metrics_stand_in_the_trainers_log_and_the_training_is_as_without(served, tmp_path):
    quiet, _ = trained(served, tmp_path / "quiet")
    watched, callback = trained(served, tmp_path / "watched", task=TASK, data=ROWS, out=tmp_path / "runs")
    logged = [line for line in watched.state.log_history if "own/accuracy" in line]
    assert [line["epoch"] for line in logged] == [1, 2]
    for line, result in zip(logged, callback.results, strict=True):
        accuracy = result.metrics["accuracy"]
        assert (line["own/accuracy"], line["own/accuracy_low"]) == (accuracy.value, accuracy.ci95[0])
    first, second = callback.results
    assert first.predictions[0].probabilities != second.predictions[0].probabilities
    for epoch in (1, 2):
        assert (tmp_path / "runs" / f"epoch-{epoch}" / "metrics.json").exists()

    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (quiet, watched)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for name, value in quiet.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], value), name


def test_a_group_is_logged_task_by_task(served, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    source = petals_eval.DataSource(path=str(tmp_path / "rows.jsonl"))
    tasks = [TASK.model_copy(update={"name": name, "data": source}) for name in ("own", "other")]
    trainer, _ = trained(served, tmp_path, task=petals_eval.TaskGroup(name="both", tasks=tuple(tasks)))
    assert sum({"own/accuracy", "other/accuracy"} <= line.keys() for line in trainer.state.log_history) == 2


def test_an_evaluation_that_fails_ends_the_training(served, tmp_path):
    with pytest.raises(ConfigError, match="own"):
        trained(served, tmp_path, task=TASK, data=ROWS, log_to="own")


def test_the_package_is_imported_without_transformers():
    script = "import sys, petals_eval.integrations; print('transformers' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "False\n"

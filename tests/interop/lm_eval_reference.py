"""lm-evaluation-harness, asked in a process of its own: the texts that it builds of rows, and what it computes of them.

It knows nothing of petals_eval. Settings come as JSON on stdin, answers go as JSON to stdout:

    {"tasks": [{"name", "yaml" or "config", "rows", "shots", "overrides", "bos"}, ...],
     "model": folder}

yaml: one of the harness's own task files, below lm_eval/tasks. config: a definition in its words instead. rows: a jsonl
file in place of the data set; shots: one in place of its training split. overrides: keys of the definition to change.
bos: the values of the model's `add_bos_token` with which the task is computed.

Answers, for each task: {"requests": [[[context, continuation] or [text] or [context, settings], ... a request], ... a
row], "right": [position or text, ... a row], "by_bos": {bos as text: {"answers", "metrics"}}}, where answers are those
of the backend `hf` to each request: [log-likelihood, is greedy], a log-likelihood, or a text.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any


def definition(wanted: dict[str, Any]) -> dict[str, Any]:
    """The harness's definition of a task, reading `rows` and `shots`."""
    import datasets
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = dict(wanted.get("config", {}))
    if "yaml" in wanted:
        config = load_yaml(Path(tasks.__file__).parent / wanted["yaml"], resolve_func=True)
        config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    config |= {"task": wanted["name"], **wanted.get("overrides", {})}
    evaluated = config.get("test_split") or config.get("validation_split") or "test"
    splits = {evaluated: rows_of(wanted["rows"])}
    config.setdefault("test_split" if evaluated == "test" else "validation_split", evaluated)
    if training := config.get("training_split"):
        splits[training] = rows_of(wanted.get("shots") or wanted["rows"])
    table = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    # A function of whatever is given to it: metadata of the definition, which no local table needs.
    return config | {"dataset_path": None, "custom_dataset": lambda **metadata: table}


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def load(wanted: dict[str, Any]) -> Any:
    """A task of the harness, as its own command sets it up."""
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=definition(wanted))
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    return task


def asked(task: Any) -> dict[str, list[Any]]:
    """What the harness asks of each row, and what it takes for right."""
    task.build_all_requests()
    requests: list[list[list[Any]]] = [[] for _ in task.eval_docs]
    for instance in task.instances:
        requests[instance.doc_id].append(list(instance.args))
    # Where the contexts differ and not their continuation, it is the "text" that says which one is right.
    right = [task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row) for row in task.eval_docs]
    if task.OUTPUT_TYPE == "multiple_choice":
        # Some say the right choice itself, and not its position.
        rows = zip(right, task.eval_docs, strict=True)
        right = [task.doc_to_choice(row).index(said) if isinstance(said, str) else said for said, row in rows]
    return {"requests": requests, "right": right}


def computed(settings: dict[str, Any], bos: bool | None) -> dict[str, dict[str, Any]]:
    """What the harness computes of all tasks on one model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=settings["model"],
        device="cpu",
        dtype="float32",
        batch_size=64,
        add_bos_token=bos,
    )
    tasks = {wanted["name"]: load(wanted) for wanted in settings["tasks"] if bos in wanted["bos"]}
    found: dict[str, dict[str, Any]] = {}
    for generated in (False, True):
        chosen = {name: task for name, task in tasks.items() if (task.OUTPUT_TYPE == "generate_until") == generated}
        if not chosen:
            continue
        if generated:
            # One at a time: rows padded to one length are computed with other roundings than the row alone.
            model.batch_size_per_gpu = 1
        done = evaluate(lm=model, task_dict={"tasks": chosen}, bootstrap_iters=0)
        for name in chosen:
            filters = [sample["filter"] for sample in done["samples"][name]]
            first = [sample for sample in done["samples"][name] if sample["filter"] == filters[0]]
            rows = sorted(first, key=lambda sample: sample["doc_id"])
            found[name] = {
                "answers": [[answers[0] for answers in sample["resps"]] for sample in rows],
                "metrics": {key: value for key, value in done["results"][name].items() if isinstance(value, float)},
            }
    return found


def main() -> None:
    settings = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints
        answer: dict[str, Any] = {wanted["name"]: asked(load(wanted)) | {"by_bos": {}} for wanted in settings["tasks"]}
        for bos in (None, True, False):
            for name, found in computed(settings, bos).items():
                answer[name]["by_bos"][str(bos)] = found
    json.dump(answer, sys.stdout, default=float)


if __name__ == "__main__":
    main()

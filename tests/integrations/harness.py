"""Tasks of lm-evaluation-harness in local files, and its evaluation of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.interop.lm_eval_tasks import OWN, write_own_rows
from tests.interop.test_lm_eval import is_same as is_printed_alike

__all__ = ["evaluated", "same_answers", "write_tasks"]

LIKELIHOOD_ERROR = 1e-4  # of a request, in nats
DOCUMENT_ERROR = 1e-6  # of a document, of its value


def write_tasks(folder: Path, realdata: Path, *, documents: int | None) -> list[str]:
    """Write task files that read TREC, SST-2, COPA and so many TinyStories documents here; returns their names."""
    for name, rows in write_own_rows(realdata, folder, documents=documents).items():
        local = {"path": "json", "data_files": {"test": str(rows)}}
        config = {"task": name, "dataset_path": local.pop("path"), "dataset_kwargs": local, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"fewshot_split": "test"} | OWN[name].theirs))
    return list(OWN)


def evaluated(
    lm: Any, folder: Path, names: Sequence[str], *, shots: int = 0, limit: int | None = None, **options: Any
) -> Any:
    """What the harness makes of these task files with a model; options: any of its `evaluate`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, **options)


def same_answers(ours: Any, theirs: Any) -> int:
    """Hold every request and every printed metric of one evaluation against another; returns the requests."""
    count = 0
    assert ours["samples"].keys() == theirs["samples"].keys()
    for name, samples in theirs["samples"].items():
        by_row = {(sample["doc_id"], sample["filter"]): sample for sample in ours["samples"][name]}
        assert len(by_row) == len(samples) > 0
        for sample in samples:
            own = by_row[sample["doc_id"], sample["filter"]]
            assert own["arguments"] == sample["arguments"]
            for [answer], [expected] in zip(own["resps"], sample["resps"], strict=True):
                assert is_same(answer, expected), f"{name}, row {sample['doc_id']}: ours {answer}, theirs {expected}"
                count += 1
        for metric, value in theirs["results"][name].items():
            own = ours["results"][name][metric]
            is_number = isinstance(value, float)
            assert is_printed_alike(own, value) if is_number else own == value, f"{name}, {metric}: {own}, {value}"
    return count


def is_same(answer: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return abs(answer[0] - expected[0]) <= LIKELIHOOD_ERROR and answer[1] is expected[1]
    if isinstance(expected, float):
        return abs(answer - expected) <= DOCUMENT_ERROR * abs(expected)
    return answer == expected

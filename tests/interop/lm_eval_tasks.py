"""Which task of lm-evaluation-harness each shipped task equals, and how the harness is asked."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = HERE.parent / "tasks" / "rows"


@dataclass(frozen=True)
class Counterpart:
    """A task file of the harness, below its lm_eval/tasks, and rows of ours with the columns of its data set.

    metrics: our name of each of its metrics, or of one of its filters. shots: rows in place of its training split.
    """

    yaml: str
    rows: str
    metrics: dict[str, str]
    shots: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def wanted(self, name: str) -> dict[str, Any]:
        """Return the settings of lm_eval_reference.py for it."""
        shots = None if self.shots is None else str(ROWS / self.shots)
        return {
            "name": name,
            "yaml": self.yaml,
            "rows": str(ROWS / self.rows),
            "shots": shots,
            "overrides": self.overrides,
        }


_ACC = {"acc": "acc"}
_NORM = {"acc": "acc", "acc_norm": "acc_norm"}
COUNTERPARTS = {
    "cola_choice": Counterpart("glue/cola/default.yaml", "cola.jsonl", {"mcc": "mcc"}),
    "sst2_choice": Counterpart("glue/sst2/default.yaml", "sst2.jsonl", _ACC),
    "rte_choice": Counterpart("glue/rte/default.yaml", "rte.jsonl", _ACC),
    "mrpc_choice": Counterpart("glue/mrpc/default.yaml", "mrpc.jsonl", {"acc": "acc", "f1": "f1[equivalent]"}),
    "qnli_choice": Counterpart("glue/qnli/default.yaml", "qnli.jsonl", _ACC),
    "qqp_choice": Counterpart("glue/qqp/default.yaml", "qqp.jsonl", {"acc": "acc", "f1": "f1[duplicate]"}),
    "mnli_choice": Counterpart("glue/mnli/default.yaml", "mnli.jsonl", _ACC),
    "wic_choice": Counterpart("super_glue/wic/default.yaml", "wic.jsonl", _ACC),
    "cb_choice": Counterpart("super_glue/cb/default.yaml", "cb.jsonl", {"acc": "acc", "f1": "f1_macro"}),
    "boolq_choice": Counterpart("super_glue/boolq/default.yaml", "boolq_choice.jsonl", _ACC),
    "copa": Counterpart("super_glue/copa/default.yaml", "copa.jsonl", _ACC),
    "hellaswag": Counterpart("hellaswag/hellaswag.yaml", "hellaswag.jsonl", _NORM),
    "piqa": Counterpart("piqa/piqa.yaml", "piqa.jsonl", _NORM),
    "arc_easy": Counterpart("arc/arc_easy.yaml", "arc_easy.jsonl", _NORM),
    "arc_challenge": Counterpart("arc/arc_challenge.yaml", "arc_challenge.jsonl", _NORM),
    "winogrande": Counterpart("winogrande/default.yaml", "winogrande.jsonl", _ACC),
    "lambada": Counterpart("lambada/lambada_openai.yaml", "lambada.jsonl", {"acc": "acc", "perplexity": "perplexity"}),
    "wikitext": Counterpart(
        "wikitext/wikitext.yaml",
        "wikitext.jsonl",
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
    "gsm8k": Counterpart(
        "gsm8k/gsm8k.yaml",
        "gsm8k.jsonl",
        {
            "exact_match,strict-match": "exact_match[strict]",
            "exact_match,flexible-extract": "exact_match[flexible]",
        },
        shots="gsm8k.train.jsonl",
        # Five shots in the context of the small model leave room for so many new tokens.
        overrides={
            "generation_kwargs": {
                "until": ["Question:", "</s>", "<|im_end|>"],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": 32,
            }
        },
    ),
}


@dataclass(frozen=True)
class Own:
    """A task with templates of ours, and the same in the harness's words. metrics: our name of each of its metrics."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    metrics: dict[str, str]


def _choice(text: str, choices: list[str], metrics: dict[str, str], listed: list[str] | None = None) -> Own:
    """A task of choices in our words and in the harness's. text, choices: templates of ours. metrics: as in `Own`.

    listed: what of them our task lists, where the names are others.
    """
    columns = [choice.strip("{}") for choice in choices if choice.startswith("{")]
    return Own(
        {
            "kind": "choice",
            "text": text,
            "choices": choices,
            "label_column": "label",
            "metrics": listed or list(metrics.values()),
        },
        {
            "output_type": "multiple_choice",
            "doc_to_text": text.replace("{", "{{").replace("}", "}}"),
            "doc_to_choice": f"{{{{[{', '.join(columns)}]}}}}" if columns else choices,
            "doc_to_target": "label",
            "metric_list": [{"metric": name} for name in metrics],
        },
        metrics,
    )


OWN = {
    "copa_questions": _choice(
        "{premise}\nWhat was the {question}?",
        ["{choice1}", "{choice2}"],
        {name: name for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")},
    ),
    "trec_words": _choice(
        "Question: {text}\nThe answer is",
        ["a description", "a thing", "some letters", "a person", "a place", "a number"],
        {name: name for name in ("acc", "acc_norm", "acc_bytes")},
    ),
    "sst2_words": _choice(
        "{sentence}\nThis film was",
        ["bad", "good"],
        {"acc": "acc", "acc_norm": "acc_norm", "mcc": "mcc", "f1": "f1[good]"},
        ["acc", "acc_norm", "mcc", "f1_per_class"],
    ),
    "stories": Own(
        {"kind": "perplexity", "text": "{page}"},
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        {name: name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    ),
    "stories_continued": Own(
        {
            "kind": "generation",
            "text": "{beginning}",
            "answer": "{word}",
            "max_new_tokens": 48,
            "stop": ["\n\n", ". Then", "!"],
            "extract": {"word": {"pattern": "([A-Za-z]+)"}},
            "normalise": {"ignore_case": True},
            "metrics": ["exact_match"],
        },
        {
            "output_type": "generate_until",
            "doc_to_text": "{{beginning}}",
            "doc_to_target": "{{word}}",
            "generation_kwargs": {"max_gen_toks": 48, "until": ["\n\n", ". Then", "!"], "do_sample": False},
            "filter_list": [
                {
                    "name": "word",
                    "filter": [{"function": "regex", "regex_pattern": "([A-Za-z]+)"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "ignore_case": True}],
        },
        {"exact_match": "exact_match[word]"},
    ),
}


BOS: dict[str, bool | None] = {"auto": None, "always": True, "never": False}
"""Our word for each value of the harness's `add_bos_token`."""


def bos_of(name: str) -> list[str]:
    """With and without a beginning-of-text token; of shipped tasks with few rows, one a kind without."""
    if name in OWN:
        return ["always", "never"]
    return ["auto", "never"] if name in ("winogrande", "lambada", "wikitext") else ["auto"]


def ask_lm_eval(model: Path, own_rows: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What lm_eval_reference.py answers of all tasks; `folder` is for its caches."""
    wanted = [counterpart.wanted(name) for name, counterpart in COUNTERPARTS.items()]
    wanted += [{"name": name, "config": own.theirs, "rows": str(own_rows[name])} for name, own in OWN.items()]
    tasks = [each | {"bos": [BOS[bos] for bos in bos_of(each["name"])]} for each in wanted]
    return _ask({"tasks": tasks, "model": str(model)}, folder)


def write_own_rows(
    realdata: Path, folder: Path, *, documents: int | None, questions: int | None = None
) -> dict[str, Path]:
    """Write the rows of the tasks of our own as jsonl, of the stories so many documents and of each task of choices so
    many questions. Returns the file of each."""
    copa = [json.loads(line) for name in ("dev", "test") for line in _lines(realdata / "copa" / f"{name}.jsonl")]
    trec = [line.partition(" ") for line in _lines(realdata / "trec" / "TREC.test.all", "latin-1")]
    sst2 = [line.rpartition("\t") for line in _lines(realdata / "sst2" / "dev.tsv")]
    paragraphs = (realdata / "tinystories" / "validation.txt").read_text(encoding="utf-8").strip().split("\n\n")
    stories = ["\n\n".join(paragraphs[at : at + 40]) for at in range(0, len(paragraphs), 40)][:documents]
    words = [paragraph.split(" ") for paragraph in paragraphs[:16]]
    rows: dict[str, list[dict[str, Any]]] = {
        "copa_questions": copa[:questions],
        "trec_words": [{"text": text, "label": int(label)} for label, _, text in trec[:questions]],
        "sst2_words": [{"sentence": sentence, "label": int(label)} for sentence, _, label in sst2[:questions]],
        "stories": [{"page": story} for story in stories],
        "stories_continued": [{"beginning": " ".join(each[:9]), "word": each[9]} for each in words if len(each) > 9],
    }
    for name, found in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in rows}


def _lines(path: Path, encoding: str = "utf-8") -> list[str]:
    return path.read_text(encoding=encoding).splitlines()


def _ask(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    environment = os.environ | {
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "lm_eval_reference.py")],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=540,
    )
    if done.returncode:
        raise RuntimeError(f"lm_eval_reference.py ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)

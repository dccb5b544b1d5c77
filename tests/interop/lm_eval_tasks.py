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

    metrics: our name of each of its metrics. shots: rows in place of its training split.
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
    "gsm8k": Counterpart("gsm8k/gsm8k.yaml", "gsm8k.jsonl", {"exact_match": "exact_match"}, shots="gsm8k.train.jsonl"),
}


def ask_lm_eval(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What lm_eval_reference.py answers; `folder` is for its caches."""
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
        timeout=240,
    )
    if done.returncode:
        raise RuntimeError(f"lm_eval_reference.py ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)

"""The workloads of bench_vs_petals.py: a model, its prompts, a task with data, servers and their links."""

import json
import os
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from petals_eval.local_swarm.network import LinkProfile

ROOT = Path(__file__).resolve().parents[1]
HOME = LinkProfile(delay=0.02, up_mbps=100, down_mbps=100)  # 20 ms each way, 100 Mbit/s
WIDE = LinkProfile(delay=0.02, up_mbps=40, down_mbps=40)
SLOWED = 5


@dataclass(frozen=True)
class Workload:
    """What both loops evaluate.

    adapter: None for a task that asks the word head of the model as it is.
    links: one a server; None: no emulated network. batch_sizes: what Petals' loop is tried with.
    padded: also time Petals' loop padded to max_length. leave_out: servers (by place in `spans`) without which our
    client is timed instead of Petals', for comparison with itself.
    """

    model: Path
    adapter: Path | None
    tuning_mode: str
    task: str
    data: Path
    max_length: int = 96
    spans: tuple[tuple[int, int], ...] = ((0, 2), (2, 4), (4, 5))
    links: tuple[LinkProfile, ...] | None = (HOME,) * 3
    dtype: str = "float32"
    batch_sizes: Sequence[int] = (8, 16, 32, 64, 128)
    sweep_rows: int = 500
    padded: bool = False
    leave_out: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class PushWorkload:
    """What our client evaluates with and without pushing, on servers of a local swarm.

    uplink: Mbit/s that leave the client, to all servers together.
    """

    model: Path
    adapter: Path
    task: str
    data: Path
    spans: tuple[tuple[int, int], ...] = ((0, 2), (2, 4), (4, 6), (6, 8))
    dtype: str = "float32"
    uplink: float = 20.0


@dataclass
class Workloads:
    """Makes a workload by its name; what has to be written for it goes to `folder`."""

    folder: Path
    realdata: Path = field(default_factory=lambda: Path(os.environ.get("PETALS_EVAL_REALDATA", _REALDATA)))

    def make(self, name: str) -> Workload:
        return self._makers()[name]()

    def push(self) -> PushWorkload:
        model, adapter = make_llama(self.folder / "wide", hidden=1024)
        return PushWorkload(model, adapter, *make_task(self.folder / "letters", rows=128, tokens=(16, 128)))

    @classmethod
    def names(cls) -> list[str]:
        return list(cls(Path())._makers())

    def _makers(self) -> dict[str, Callable[[], Workload]]:
        return {
            "trec-test": lambda: replace(self._trec(), padded=True),
            "trec-all": self._trec_all,
            "sst2": self._sst2,
            "choice": self._choice,
            "trec-local": lambda: replace(self._trec(), links=None, padded=True),
            "wide-float32": lambda: self._wide("float32"),
            "wide-bfloat16": lambda: self._wide("bfloat16"),
            "slow-replica": self._slow_replica,
        }

    def _trec(self) -> Workload:
        from tests.interop.petals_folders import petals_copy

        model = self.folder / "stories260K-hf"
        if not model.exists():
            petals_copy(self.realdata / model.name, model)
        return Workload(
            model,
            self.realdata / "adapters" / "trec-deep_ptune",
            "deep_ptune",
            "trec",
            self.realdata / "trec" / "TREC.test.all",
        )

    def _trec_all(self) -> Workload:
        data = self.folder / "TREC.all"
        parts = [self.realdata / "trec" / name for name in ("TREC.train.all", "TREC.test.all")]
        data.write_bytes(b"".join(part.read_bytes().rstrip(b"\n") + b"\n" for part in parts))
        return replace(self._trec(), data=data)

    def _sst2(self) -> Workload:
        adapter, data = self.realdata / "adapters" / "sst2-deep_ptune", self.realdata / "sst2" / "dev.tsv"
        return replace(self._trec(), adapter=adapter, task="sst2", data=data)

    def _choice(self) -> Workload:
        task, data = make_choices(self.folder / "endings", self.realdata / "trec" / "TREC.train.all", rows=1000)
        return replace(self._trec(), adapter=None, tuning_mode="", task=task, data=data, sweep_rows=250)

    def _slow_replica(self) -> Workload:
        slow = replace(HOME, delay=HOME.delay * SLOWED, up_mbps=100 / SLOWED, down_mbps=100 / SLOWED)
        spans = self._trec().spans
        return replace(
            self._trec_all(),
            spans=spans + spans,
            links=(HOME, HOME, HOME, HOME, slow, HOME),
            leave_out=(4,),
            note=f"the second server of blocks {spans[1]} has a fifth of the rate and five times the delay",
        )

    def _wide(self, dtype: str) -> Workload:
        model, adapter = make_llama(self.folder / "wide", hidden=1024)
        return Workload(
            model,
            adapter,
            "ptune",
            *make_task(self.folder / "letters", rows=256, tokens=(16, 128)),
            max_length=128,
            spans=((0, 2), (2, 4), (4, 6), (6, 8)),
            links=(WIDE,) * 4,
            dtype=dtype,
            batch_sizes=(8, 16, 32, 64),
            sweep_rows=64,
        )


_REALDATA = ROOT.parent / "shared" / "realdata"
LABELS = 4
PREFIX = 8


def make_llama(
    folder: Path, *, hidden: int, blocks: int = 8, prefix: int = PREFIX, deep: bool = False
) -> tuple[Path, Path]:
    """A random Llama with small blocks, and tuned prompts with a head for it, `deep_ptune` ones where they are deep.

    Weights as Hugging Face draws them: tame, so that rounding moves the logits little. The checkpoint is float32: so
    is the client, whatever the servers compute in.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.interop.petals_folders import in_old_words
    from tests.support.tiny_models import write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=hidden // 4,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    if not folder.exists():
        LlamaForCausalLM(config).save_pretrained(folder)
        write_tokenizer(folder)
        in_old_words(folder)
    adapter = folder.parent / f"{folder.name}-ptune.bin"
    prompts, head = 0.02 * torch.randn(prefix, hidden), 0.2 * torch.randn(LABELS, hidden)
    tensors = {"model.prompt_embeddings.weight": prompts, "score.weight": head}
    if deep:
        tensors["model.intermediate_prompt_embeddings.weight"] = 0.02 * torch.randn(prefix, blocks * hidden)
    torch.save(tensors, adapter)
    return folder, adapter


def make_choices(folder: Path, questions: Path, *, rows: int, choices: int = 4, words: int = 4) -> tuple[str, Path]:
    """A task of choices: how a question of TREC goes on, its own last `words` or those of three others.

    Returns its YAML file and its data.
    """
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    split = [line.split(" ")[1:] for line in questions.read_text(encoding="latin-1").splitlines()]
    asked = [each for each in split if len(each) > 2 * words][:rows]
    endings = [" ".join(each[-words:]) for each in asked]
    lines = []
    for row, each in enumerate(asked):
        others = draw.sample(sorted(set(endings) - {endings[row]}), choices - 1)
        label = draw.randrange(choices)
        offered = [*others[:label], endings[row], *others[label:]]
        lines.append(json.dumps({"start": " ".join(each[:-words]), "endings": offered, "label": label}))
    data, task = folder / "endings.jsonl", folder / "endings.yaml"
    data.write_text("\n".join(lines) + "\n")
    task.write_text(
        'kind: choice\nname: endings\ntext: "{start}"\nchoices_column: endings\nlabel_column: label\n'
        "metrics: [acc, acc_norm]\n"
    )
    return str(task), data


def make_task(folder: Path, *, rows: int, tokens: tuple[int, int], in_front: int = 0) -> tuple[str, Path]:
    """A task over texts of random letters, a token each: `tokens` at least and at most, with the one put in front.

    in_front: as many more that all rows begin with. Returns its YAML file and its data.
    """
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    alike = "".join(draw.choices(string.ascii_lowercase, k=in_front))
    lines = [
        json.dumps(
            {"text": "".join(draw.choices(string.ascii_lowercase, k=draw.randint(*tokens) - 1)), "label": row % LABELS}
        )
        for row in range(rows)
    ]
    data, task = folder / "letters.jsonl", folder / "letters.yaml"
    data.write_text("\n".join(lines) + "\n")
    names = ", ".join(f"label{index}" for index in range(LABELS))
    task.write_text(
        f'name: letters\ntext: "{alike}{{text}}"\nlabel_column: label\nlabel_names: [{names}]\n'
        f"max_length: {in_front + tokens[1]}\nmetrics: [accuracy, f1_macro]\n"
    )
    return str(task), data

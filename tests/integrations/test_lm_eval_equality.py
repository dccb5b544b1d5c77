"""The same task files give the same numbers with the harness's backend `hf` and with ours over a swarm."""

from pathlib import Path
from typing import Any

import pytest

from petals_eval.local_swarm import LocalSwarm
from tests.integrations.harness import evaluated, same_answers
from tests.support.tiny_models import make_tiny

# The harness and its `hf` use what their libraries have deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(3600)]

QUESTIONS = ("trec_words", "sst2_words", "copa_questions", "stories_continued")
ROWS_AT_ONCE = 32  # of `hf`


@pytest.fixture(scope="module")
def limit(request) -> int | None:
    """Rows of each task: all of them, 500, 872, 150 and so on, in scripts/soak.sh."""
    return None if request.config.getoption("--soak") else 4


def both(where: dict[str, Any], peft: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """Our backend and the harness's, of the same model with the same settings."""
    from lm_eval.models.huggingface import HFLM

    from petals_eval.integrations.lm_eval import LM

    theirs = HFLM(where["pretrained"], device="cpu", dtype="float32", peft=peft, **settings)
    return LM(**where, **settings, **({} if peft is None else {"adapter": peft})), theirs


def held(pair: tuple[Any, Any], folder: Path, names: tuple[str, ...], **options: Any) -> int:
    lm, hf = pair
    count = 0
    with lm:
        for name in names:
            # Texts one at a time: rows that are padded to one length are computed with other roundings than one alone.
            hf.batch_size_per_gpu = 1 if name == "stories_continued" else ROWS_AT_ONCE
            count += same_answers(evaluated(lm, folder, [name], **options), evaluated(hf, folder, [name], **options))
    return count


@pytest.mark.sample(1)
@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("chat", [False, True])
def test_choices_and_generated_texts(shots, bos, chat, where, task_files, limit):
    pair = both(where, add_bos_token=bos)
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    count = held(pair, task_files, QUESTIONS, shots=shots, limit=limit, **(options if chat else {}))
    assert count == (4 * 6 + 4 * 2 + 4 * 4 + 4 if limit else 500 * 6 + 872 * 2 + 150 * 4 + 16)


@pytest.mark.sample(1)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("max_length", [None, 100])
def test_documents(bos, max_length, where, task_files):
    assert held(both(where, add_bos_token=bos, max_length=max_length), task_files, ("stories",)) >= 2


def test_texts_that_are_cut_from_the_left(where, task_files):
    """Contexts longer than max_length, and a prefix token that is none of the tokenizer's own."""
    pair = both(where, max_length=60, prefix_token_id=5)
    assert held(pair, task_files, ("copa_questions", "stories_continued"), shots=2, limit=4) == 4 * 4 + 4


def test_a_tuned_prompt(where, causal_prompt, task_files):
    pair = both(where, peft=str(causal_prompt), max_length=504)
    assert held(pair, task_files, ("sst2_words", "stories"), shots=1, limit=4) >= 4 * 2 + 2


@pytest.mark.soak
@pytest.mark.parametrize("family", ["bloom", "falcon", "qwen2", "gemma2"])
def test_other_families(family, task_files, tmp_path):
    folder = make_tiny(family, tmp_path / family)
    with LocalSwarm(folder, servers=2, mode="thread") as swarm:
        where = {"pretrained": str(folder), "initial_peers": swarm.initial_peers, "dht_prefix": swarm.dht_prefix}
        assert held(both(where), task_files, ("sst2_words", "stories"), limit=2) == 2 * 2 + 2

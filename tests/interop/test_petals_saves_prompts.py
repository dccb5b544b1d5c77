"""What the lines of the guide save in a Petals training loop is what Petals itself computes with."""

import json

import pytest
import torch

from petals_eval import RemoteModel
from petals_eval.local_swarm import LocalSwarm
from petals_eval.tasks.requests import Request
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import modes_line, run_petals_loop
from tests.interop.server_kinds import PETALS
from tests.model.reference import TOKENS
from tests.support.saving_lines import saving_lines

LABELS, PREFIX, HIDDEN, BLOCKS = 3, 4, 32, 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", PETALS.families)
def test_the_lines_of_the_readme(family, tmp_path):
    model = make_petals_tiny(family, tmp_path / "model", blocks=BLOCKS, hidden=HIDDEN)
    base = "model" if family == "llama" else "transformer"
    state = {
        f"{base}.prompt_embeddings.weight": torch.randn(PREFIX, HIDDEN),
        f"{base}.intermediate_prompt_embeddings.weight": torch.randn(PREFIX, BLOCKS * HIDDEN),
        "score.weight": torch.randn(LABELS, HIDDEN),
    }
    torch.save(state, tmp_path / "before.pt")
    folders = {name: tmp_path / name for name in ("all", "alone")}
    for folder in folders.values():
        folder.mkdir()
    modes = modes_line(tmp_path / "modes.json", {"input_ids": [list(TOKENS)]})
    lines = [saving_lines(folder)[number] for number, folder in enumerate(folders.values())]
    with LocalSwarm(model, servers=1, mode="thread", dht_prefix="tiny") as swarm:
        asked = {
            "model": str(model),
            "initial_peers": swarm.initial_peers,
            "dht_prefix": "tiny",
            "save": [*lines, modes],
        }
        asked |= {"adapter": str(tmp_path / "before.pt"), "tuning_mode": "deep_ptune", "tokens": [TOKENS]}
        [expected] = run_petals_loop(asked | {"pad_token_id": None}, tmp_path)["logits"]
        with RemoteModel.from_pretrained(
            str(model), adapter=folders, initial_peers=swarm.initial_peers, dht_prefix="tiny"
        ) as remote:
            whole, alone = remote.adapters
            [found] = remote.compute([Request("0", 0, TOKENS)], whole)
    # A live Petals model, whose blocks are on a swarm in eval mode: nothing differs.
    shown = json.loads((tmp_path / "modes.json").read_text())
    assert shown["is_deterministic"] and shown["gradients"]["is_equal"] and shown["half_precision"] == []
    assert (whole.name, alone.name) == ("all", "alone")
    torch.testing.assert_close(found.answer, torch.tensor(expected), rtol=0, atol=1e-4)
    assert torch.equal(alone.prompts, whole.prompts) and torch.equal(alone.deep_prompts, whole.deep_prompts)
    assert torch.equal(whole.prompts, state[f"{base}.prompt_embeddings.weight"])

"""Petals' own classifiers read the token that our rule for its checkpoints gives, in texts with padding tokens."""

import pytest
import torch

from petals_eval import RemoteModel
from petals_eval.local_swarm import LocalSwarm
from tests.interop.petals_folders import make_petals_tiny
from tests.interop.real_petals import run_petals_loop
from tests.interop.server_kinds import PETALS
from tests.model.test_pooling import PAD, TEXTS, requests_of

LABELS, PREFIX, HIDDEN, BLOCKS = 3, 4, 32, 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", PETALS.families)
def test_the_token_that_petals_reads(family, tmp_path):
    model = make_petals_tiny(family, tmp_path / "model", blocks=BLOCKS, hidden=HIDDEN, pad_token_id=PAD)
    draws = torch.Generator().manual_seed(0)
    base = "model" if family == "llama" else "transformer"
    state = {
        f"{base}.prompt_embeddings.weight": torch.randn(PREFIX, HIDDEN, generator=draws),
        "score.weight": torch.randn(LABELS, HIDDEN, generator=draws),
    }
    adapter = tmp_path / "prompts.pt"
    torch.save(state, adapter)
    with LocalSwarm(model, servers=1, mode="thread", dht_prefix="tiny") as swarm:
        asked = {"model": str(model), "initial_peers": swarm.initial_peers, "dht_prefix": "tiny"}
        asked |= {"adapter": str(adapter), "tuning_mode": "ptune", "tokens": TEXTS, "pad_token_id": PAD}
        expected = run_petals_loop(asked, tmp_path)["logits"]
        with RemoteModel.from_pretrained(
            str(model), adapter=str(adapter), initial_peers=swarm.initial_peers, dht_prefix="tiny"
        ) as remote:
            found = {each.request.key: each.answer for each in remote.compute(requests_of(), remote.adapters[0])}
    for key, logits in enumerate(expected):
        torch.testing.assert_close(found[str(key)], torch.tensor(logits), rtol=0, atol=1e-4)

"""Greedy texts of every family, with tiny random weights, are Hugging Face's own: in sessions and by forward calls."""

import pytest

from petals_eval import RemoteModel
from petals_eval.errors import ModelError
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import OtherLayout
from petals_eval.model import LocalModel
from petals_eval.tasks.requests import Decoding, Request
from tests.model.reference import TOKENS, causal_lm, full_logits, make_adapter
from tests.support.tiny_models import FAMILIES, make_tiny

BLOCKS, NEW = 4, 6
TEXTS = ((*TOKENS, 20, 30, 40), TOKENS[:1])


def expected(whole, local, adapter, text):
    """The likeliest token after a forward of all before it, again and again."""
    tokens = list(text)
    for _ in range(NEW):
        tokens.append(int(full_logits(whole, local, adapter, tuple(tokens))[-1].argmax()))
        if tokens[-1] in local.end_tokens():
            break
    return tuple(tokens[len(text) :])


@pytest.mark.sample(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family(family, tmp_path):
    folder = make_tiny(family, tmp_path, blocks=BLOCKS)
    whole = causal_lm(folder)
    requests = [Request(str(index), 0, text, decoding=Decoding(NEW)) for index, text in enumerate(TEXTS)]
    with (
        LocalSwarm(folder, spans=[(0, 1), (1, 4)], mode="thread", dht_prefix="tiny") as swarm,
        RemoteModel.from_pretrained(str(folder), initial_peers=swarm.initial_peers, dht_prefix="tiny") as model,
    ):
        for kind in ("none", "deep_ptune"):
            adapter = make_adapter(model.local, kind)
            right = {each.key: expected(whole, model.local, adapter, each.input_ids) for each in requests}
            found = {each.request.key: each.answer.token_ids for each in model.generate(requests, adapter)}
            assert found == right, kind
        for server in swarm.servers:
            server.switch(OtherLayout())
        with RemoteModel.from_pretrained(str(folder), initial_peers=swarm.initial_peers, dht_prefix="tiny") as other:
            said: list[str] = []
            found = {
                each.request.key: each.answer.token_ids
                for each in other.generate(requests, adapter, on_notice=said.append)
            }
        assert found == right and len(said) == 1, "by forward calls"


def test_a_token_that_ends_texts_is_known_from_three_places(tmp_path):
    """The generation config, the config, and the tokenizer."""
    folder = make_tiny("llama", tmp_path, eos_token_id=[5, 7])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert LocalModel.from_pretrained(str(folder)).end_tokens() == {2, 5, 7, 9, 11}
    (folder / "generation_config.json").unlink()
    assert LocalModel.from_pretrained(str(folder)).end_tokens() == {2, 5, 7}
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="is no generation config"):
        LocalModel.from_pretrained(str(folder)).end_tokens()

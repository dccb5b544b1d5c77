"""Texts that real Petals servers generate are Hugging Face's own: in their sessions, and by a forward call a token."""

import pytest

from petals_eval import RemoteModel
from petals_eval.errors import PeerNoSessionError
from petals_eval.model import load_adapter
from petals_eval.swarm.transport.opening import SessionOpener
from petals_eval.tasks.requests import Decoding, Request
from tests.generation.test_engine import expected_text
from tests.model.reference import causal_lm

TEXTS = ("Once upon a time", "Lily and Tom went to the park. They saw a big dog and", "The")


@pytest.mark.parametrize("way", ["in sessions", "by calls"])
def test_greedy_texts_of_real_servers(way, stories, stories_dir, realdata, monkeypatch):
    said: list[str] = []
    if way == "by calls":

        async def refuse(opener, peer, hop):
            peer.cache.on_incompatible("not for this test")
            raise PeerNoSessionError("not for this test")

        monkeypatch.setattr(SessionOpener, "check", refuse)
    whole = causal_lm(stories_dir)
    with RemoteModel.from_pretrained(
        str(stories_dir), initial_peers=stories.initial_peers, dht_prefix=stories.dht_prefix
    ) as model:
        tokenizer = model.local.tokenizer
        requests = [
            Request(str(index), 0, tuple(tokenizer(text)["input_ids"]), decoding=Decoding(16))
            for index, text in enumerate(TEXTS)
        ]
        for name in (None, "trec-deep_ptune"):
            adapter = None
            if name is not None:
                place = str(realdata / "adapters" / name)
                adapter = load_adapter(place, family=model.local.family, config=model.local.config)
            found = {each.request.key: each for each in model.generate(requests, adapter, on_notice=said.append)}
            assert {key: each.answer.text for key, each in found.items()} == {
                each.key: expected_text(whole, model, adapter, each) for each in requests
            }
            assert all(hop.version == stories.kind.version for each in found.values() for hop in each.hops)
    assert (len(said) > 0) == (way == "by calls")

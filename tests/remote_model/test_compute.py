"""RemoteModel.compute by itself: what is sent for requests. No swarm."""

from types import SimpleNamespace

import torch

from petals_eval.model import Adapter
from petals_eval.model.rotary import RotaryScaling
from petals_eval.remote_model import RemoteModel
from petals_eval.tasks.requests import Request


def test_deep_prompts_are_rounded_to_the_dtype_at_home_as_petals_does():
    """Also for servers of a wider one, or the same prompts would score otherwise in the training loop."""

    class Local(torch.nn.Module):
        dtype = torch.bfloat16
        hidden_size = 2
        config = SimpleNamespace(to_dict=dict)
        rotary = RotaryScaling()

        def check_length(self, tokens, prefix):
            pass

        def embed(self, input_ids, adapter):
            return torch.zeros(*input_ids.shape, 2, dtype=self.dtype)

    sent = []
    blocks = SimpleNamespace(
        stream=lambda work, **options: (nothing for nothing in sent.extend(work) or ()),
        settings=SimpleNamespace(lanes="never"),
        warn_of_dropout=lambda found: 0,
        limit_steps=lambda positions: 0,
        positions_at_once=lambda hidden_size, dtype: 100,
        micro_batch_bytes=1000,
    )
    adapter = Adapter("a", "deep_ptune", torch.rand(1, 2), torch.rand(4, 1, 1, 2))
    assert list(RemoteModel(Local(), blocks).compute([Request("0", 0, (1, 2))], adapter)) == []
    assert torch.equal(sent[0].prompts, adapter.deep_prompts.bfloat16())
    assert sent[0].prompts.dtype is torch.bfloat16

"""Answers to rpc_info as hivemind writes them."""

import torch
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

DESCRIPTOR = BatchTensorDescriptor(1, 64, dtype=torch.bfloat16)


def info(**changes: object) -> bytes:
    """Return the answer of a Petals server that computes in bfloat16; changes: of its fields."""
    fields = {
        "version": "2.2.0",
        "dht_client_mode": False,
        "cache_tokens_available": 10,
        "forward_schema": ((DESCRIPTOR,), {}),
        "outputs_schema": (DESCRIPTOR,),
        "keyword_names": (),
        "inference_schema": ((DESCRIPTOR,) * 3, {}),
    }
    return MSGPackSerializer.dumps({**fields, **changes})

"""hivemind's own codecs, and through them bitsandbytes', at work on given tensors; run in the Petals environment.

Reads {"folder": ...} from stdin. Takes there: tensors.pt (by name) and ours.pt ({"name code": a message's bytes}).
Leaves there: theirs.pt (the same by the real encoders, working in place and not: "name code inplace"), and decoded.pt
(what the real decoders make of all of them).
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from hivemind.compression import serialization
from hivemind.proto import runtime_pb2

CODES = (2, 3, 4, 5)  # FLOAT16, QUANTILE_8BIT, UNIFORM_8BIT, BLOCKWISE_8BIT


def main() -> None:
    folder = Path(json.load(sys.stdin)["folder"])
    tensors = torch.load(folder / "tensors.pt", weights_only=True)
    ours = torch.load(folder / "ours.pt", weights_only=True)
    theirs = {}
    for name, tensor in tensors.items():
        for code in CODES:
            if code == 2 and tensor.dtype is torch.bfloat16:
                continue  # refused
            for in_place in (False, True):
                message = serialization.serialize_torch_tensor(tensor.clone(), code, allow_inplace=in_place)
                theirs[f"{name} {code}" + " inplace" * in_place] = message.SerializeToString()
    decoded = {
        f"{whose} {key}": serialization.deserialize_torch_tensor(runtime_pb2.Tensor.FromString(content))
        for whose, messages in (("ours", ours), ("theirs", theirs))
        for key, content in messages.items()
    }
    torch.save(theirs, folder / "theirs.pt")
    torch.save(decoded, folder / "decoded.pt")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # bitsandbytes prints when it is imported
        main()
    json.dump({}, sys.stdout)

"""Our lossy codes against hivemind's and bitsandbytes' own, tensor by tensor, under the NumPy that theirs work with."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hivemind.proto import runtime_pb2

from petals_eval.swarm.wire.messages import codecs
from tests.interop.petals_folders import block_states
from tests.interop.real_petals import run_petals_loop

FLOAT16, QUANTILE, UNIFORM, BLOCKWISE = 2, 3, 4, 5


@dataclass(frozen=True)
class Exchange:
    """The tensors; messages by "name code", ours and theirs; what the real decoders made of either's."""

    tensors: dict[str, torch.Tensor]
    ours: dict[str, bytes]
    theirs: dict[str, bytes]
    decoded: dict[str, torch.Tensor]


def some_tensors(stories_dir: Path) -> dict[str, torch.Tensor]:
    """Hidden states of a real model between all of its blocks, and what codecs may stumble over."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 320, (4, 60), generator=generator)
    tensors = {f"states {index}": states for index, states in enumerate(block_states(stories_dir, texts))}
    tensors["wide"] = torch.randn(3, 50, 1024, generator=generator)
    tensors["shifted"] = 5 + torch.randn(4, 33, 100, generator=generator)
    tensors["outliers"] = torch.randn(2, 64, 64, generator=generator)
    tensors["outliers"][:, :, 7] *= 1000
    tensors["large"] = 1e5 * torch.randn(1, 3, 40, generator=generator)
    tensors["one short block"] = torch.randn(1, 1, 4095, generator=generator)
    tensors["whole blocks"] = torch.randn(2, 1, 4096, generator=generator)
    tensors["two values"] = torch.tensor([[[0.25, -3.0]]])
    tensors["bfloat16"] = tensors["wide"].bfloat16()
    tensors["float16"] = tensors["wide"].half()
    return tensors


@pytest.fixture(scope="module")
def exchange(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    folder = tmp_path_factory.mktemp("codecs")
    tensors = some_tensors(stories_dir)
    ours = {
        f"{name} {code}": codecs.encode(tensor, code).SerializeToString()
        for name, tensor in tensors.items()
        for code in (FLOAT16, UNIFORM, BLOCKWISE)
    }
    torch.save(tensors, folder / "tensors.pt")
    torch.save(ours, folder / "ours.pt")
    run_petals_loop({"folder": str(folder)}, folder, script="real_codecs.py")
    theirs, decoded = (torch.load(folder / name, weights_only=True) for name in ("theirs.pt", "decoded.pt"))
    return Exchange(tensors, ours, theirs, decoded)


def read(content: bytes) -> runtime_pb2.Tensor:
    return runtime_pb2.Tensor.FromString(content)


def test_their_decoders_and_ours_give_the_same_values(exchange):
    """Of our messages and of theirs, to the last bit."""
    assert len(exchange.decoded) > 130
    for whose, messages in (("ours", exchange.ours), ("theirs", exchange.theirs)):
        for key, content in messages.items():
            message = read(content)
            expected = exchange.decoded[f"{whose} {key}"]
            found = codecs.decode(message, tuple(expected.shape)).to(expected.dtype)
            assert torch.equal(found, expected), key


def test_our_float16_and_blockwise_encoders_give_their_bytes(exchange):
    for name, tensor in exchange.tensors.items():
        for code in (FLOAT16, BLOCKWISE):
            if code == FLOAT16 and tensor.dtype is torch.bfloat16:
                continue  # theirs refuses it
            ours, theirs = (read(found[f"{name} {code}"]).buffer for found in (exchange.ours, exchange.theirs))
            if code == BLOCKWISE and tensor.dtype is not torch.float32:
                # So few different values fall half-way between two levels, where the last bit decides.
                head = len(theirs) - tensor.numel()
                mine, real = (torch.tensor(list(found[head:])) for found in (ours, theirs))
                assert ours[:head] == theirs[:head]
                assert int((mine - real).abs().max()) <= 1 and float((mine != real).float().mean()) < 1e-3, name
            else:
                assert ours == theirs, name


def test_our_uniform_code_is_theirs_up_to_rounding(exchange):
    """A value between two buckets may fall into either; the buckets' means are added up in another order."""
    for name, tensor in exchange.tensors.items():
        ours, theirs = (read(found[f"{name} {UNIFORM}"]).buffer for found in (exchange.ours, exchange.theirs))
        assert ours[:8] == theirs[:8] and len(ours) == len(theirs)
        mine, real = (torch.tensor(list(found[8 + 1024 :])) for found in (ours, theirs))
        assert int((mine - real).abs().max()) <= 1, name
        assert float((mine != real).float().mean()) < 1e-3, name
        mine, real = (torch.frombuffer(bytearray(found[8 : 8 + 1024]), dtype=torch.float32) for found in (ours, theirs))
        deviation = float(tensor.float().std())
        apart = (mine - real).abs()
        assert float(apart.median()) <= 1e-5 * deviation, name
        assert float(apart.max()) <= 6 / 256 * deviation, name  # where a value fell into the next bucket


def test_why_answers_of_uniform8_are_asked_for_in_the_quantile_code(exchange):
    """hivemind's UNIFORM_8BIT, allowed to work in place as Petals servers allow it, loses the mean of the tensor."""
    tensor = exchange.tensors["shifted"]
    means = {
        (code, how): float(exchange.decoded[f"theirs shifted {code}{how}"].mean())
        for code in (QUANTILE, UNIFORM, BLOCKWISE)
        for how in ("", " inplace")
    }
    assert abs(means.pop((UNIFORM, " inplace"))) < 1e-3
    assert list(means.values()) == pytest.approx([float(tensor.mean())] * 5, abs=2e-3)

"""What stays at home computes the same, to the bit, whatever the program around it has set torch to."""

import threading
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from petals_eval.data import MicroBatch
from petals_eval.model import LocalModel, evaluating, load_adapter
from petals_eval.model.arithmetic import isolated_arithmetic
from petals_eval.model.blocks import BlockSpan
from petals_eval.tasks.requests import Request
from tests.support.tiny_models import make_tiny

LABELS, WIDE = 3, 256
BACKENDS: Any = torch.backends  # some of its switches are younger than its types
REQUESTS = [Request("0", 0, (1, 75, 86, 279)), Request("1", 0, (1, 75, 20), ((1, 262), (2, 75))), Request("2", 0, (1,))]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def matmul_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def fp32_precision(precision):
    BACKENDS.mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        BACKENDS.mkldnn.matmul.fp32_precision = "none"


@contextmanager
def every_backend(precision):
    BACKENDS.fp32_precision = precision
    try:
        yield
    finally:
        BACKENDS.fp32_precision = "none"


SURROUNDINGS = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "a device's block": lambda: torch.device("meta"),
    "matrix products of medium precision": lambda: matmul_precision("medium"),
    "matrix products in bfloat16": lambda: fp32_precision("bf16"),
    "TF32 everywhere": lambda: every_backend("tf32"),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and beside it prompts with their head."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("model"), blocks=2, hidden=WIDE, labels=LABELS, tied=True)
    draws = torch.Generator().manual_seed(1)
    state = {
        "model.prompt_embeddings.weight": torch.randn(4, WIDE, generator=draws),
        "model.intermediate_prompt_embeddings.weight": torch.randn(4, 2 * WIDE, generator=draws),
        "score.weight": torch.randn(LABELS, WIDE, generator=draws),
        "score.bias": torch.randn(LABELS, generator=draws),
    }
    torch.save(state, folder / "prompts.pt")
    save_file(state, folder / "prompts.safetensors")
    return folder


def everything(folder, prompts="prompts.pt"):
    """The answers of the whole local side, from the files on: embeddings, blocks at home, norm and both heads."""
    local = LocalModel.from_pretrained(str(folder))
    adapter = load_adapter(str(folder / prompts), family=local.family, config=local.config)
    span = BlockSpan.load(str(folder), 0, 2)
    batch = MicroBatch.of(REQUESTS)
    with evaluating(local):
        hidden = local.embed(batch.input_ids, adapter)
    hidden = span.forward(hidden, adapter.deep_prompts)
    with evaluating(local):
        return local.head(hidden, batch, adapter)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("prompts", ("prompts.pt", "prompts.safetensors"))
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_local_side_is_the_same_to_the_bit(name, prompts, folder):
    expected = everything(folder)
    with SURROUNDINGS[name]():
        found = everything(folder, prompts)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(answer.dtype is torch.float32 and answer.device.type == "cpu" for answer in found)


def test_that_test_can_fail(folder, monkeypatch):
    """Without the guard autocast shows."""
    expected = everything(folder)
    for place in ("petals_eval.model.eval_mode", "petals_eval.model.blocks"):
        monkeypatch.setattr(f"{place}.isolated_arithmetic", nullcontext)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(folder)
    assert not any(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_number_of_threads_moves_nothing_but_the_last_bits(threads, folder):
    expected = everything(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = everything(folder)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


def switches():
    """How the switches stand that the guard may touch."""
    matmul = torch.backends.cuda.matmul
    return (
        BACKENDS.mkldnn.matmul.fp32_precision,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.is_autocast_enabled("cpu"),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("name", [*SURROUNDINGS, "nothing"])
def test_the_switches_stand_afterwards_as_they_stood(name):
    with SURROUNDINGS.get(name, nullcontext)():
        before = switches()
        with pytest.raises(KeyError), isolated_arithmetic():
            assert not torch.is_autocast_enabled("cpu")
            assert BACKENDS.mkldnn.matmul.fp32_precision in ("none", "ieee")
            assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            raise KeyError
        assert switches() == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_two_threads_inside_at_once_leave_the_switches_as_they_were():
    """The second one must not take for the user's setting what the first one has set."""
    first_is_in, second_is_out = threading.Event(), threading.Event()

    def first():
        with isolated_arithmetic():
            first_is_in.set()
            second_is_out.wait(10)

    with matmul_precision("medium"):
        thread = threading.Thread(target=first)
        thread.start()
        assert first_is_in.wait(10)
        with isolated_arithmetic():
            pass
        assert torch.get_float32_matmul_precision() == "highest"  # one is still inside
        second_is_out.set()
        thread.join(10)
        assert torch.get_float32_matmul_precision() == "medium"


def test_what_comes_from_a_switch_above_goes_on_coming_from_it():
    with every_backend("tf32"):
        with isolated_arithmetic():
            pass
        BACKENDS.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"

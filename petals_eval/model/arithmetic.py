"""Arithmetic that depends on its tensors alone, and not on how the program around it has set torch up.

A training loop often runs under autocast, lets matrix products round to TF32 or bfloat16, or has another default
device. What stays at home is computed in the dtype and on the device that it names, whatever of that is on.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["isolated_arithmetic"]

_AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps")
_FULL = ("none", "ieee")
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_SPLIT_K = "_split_k"  # since torch 2.10 each of these comes in two parts


@contextmanager
def isolated_arithmetic() -> Iterator[None]:
    """Run the body without autocast, with matrix products in full precision, and with the CPU as default device.

    Afterwards everything is as it was. Autocast and the default device belong to the thread. The precision of matrix
    products belongs to the process: what other threads compute meanwhile is as exact as this.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST_KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_full_precision)
        yield


class _FullPrecision:
    """A context in which no switch lets a matrix product round more than its dtype does.

    Several threads may be inside at once: the first one saves how the switches stood, the last one puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._matmul_precision: str | None = None
        self._fp32_precision: list[tuple[Any, str]] = []
        self._cuda_switches: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._save()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def _save(self) -> None:
        """Save the switches, and set those that stand otherwise."""
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # the switches were set by their new names alone, below
            precision = "highest"
        self._matmul_precision = None if precision == "highest" else precision
        if self._matmul_precision is not None:
            torch.set_float32_matmul_precision("highest")
        for products in (torch.backends.mkldnn, torch.backends.cuda):
            matmul: Any = getattr(products, "matmul", None)
            value = getattr(matmul, "fp32_precision", "none")  # since torch 2.9
            if value not in _FULL:
                self._fp32_precision.append((matmul, value))
                matmul.fp32_precision = "ieee"
        cuda: Any = torch.backends.cuda.matmul
        for name in _REDUCTIONS:
            if (allowed := getattr(cuda, name)) is not False:
                split_k = getattr(cuda, name + _SPLIT_K, None)
                self._cuda_switches[name] = allowed if split_k is None else (allowed, split_k)
                setattr(cuda, name, False)
        if getattr(cuda, "allow_fp16_accumulation", False):  # since torch 2.7
            self._cuda_switches["allow_fp16_accumulation"] = True
            cuda.allow_fp16_accumulation = False

    def _restore(self) -> None:
        if self._matmul_precision is not None:
            torch.set_float32_matmul_precision(self._matmul_precision)
        for matmul, value in self._fp32_precision:
            matmul.fp32_precision = "none"  # it may have come from a switch above it
            if matmul.fp32_precision != value:
                matmul.fp32_precision = value
        for name, value in self._cuda_switches.items():
            setattr(torch.backends.cuda.matmul, name, value)
        self._matmul_precision, self._fp32_precision, self._cuda_switches = None, [], {}


_full_precision = _FullPrecision()

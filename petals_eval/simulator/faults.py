"""What the stub's faults (`petals_eval.local_swarm.faults`) make of a simulated server's answers and messages."""

from dataclasses import dataclass, replace

import torch

from petals_eval.errors import PeerAnswerError, PeerNotFiniteError
from petals_eval.local_swarm.faults import catalog as f
from petals_eval.local_swarm.faults.injector import with_flipped_bit
from petals_eval.local_swarm.faults.switch import FaultSwitch

__all__ = ["MODULUS", "Message", "corrupted", "tampered"]

MODULUS = 61
"""Of the values that simulated blocks compute with: so few that no two of them pass for one that was rounded."""


@dataclass(frozen=True, slots=True)
class Message:
    """An answer on its way: the tensor, and what its header says of it. nbytes: of the tensor, as it travels."""

    hidden: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    expected_nbytes: int
    is_finite: bool = True

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor. Raises PeerAnswerError and PeerNotFiniteError as `wire.messages.read_answer` does."""
        if self.shape != shape:
            raise PeerAnswerError(f"expected a tensor of shape {shape}, found {self.shape}")
        if self.dtype != dtype:
            raise PeerAnswerError(f"expected {dtype}, found {self.dtype}")
        if self.nbytes != self.expected_nbytes:
            raise PeerAnswerError(f"expected {self.expected_nbytes} bytes, found {self.nbytes}")
        if not self.is_finite:
            raise PeerNotFiniteError(f"1 of {self.hidden.numel()} values are not finite")
        return self.hidden


def corrupted(
    faults: FaultSwitch, hidden: torch.Tensor, asked: bytes, answered: dict[tuple[int, ...], torch.Tensor]
) -> torch.Tensor:
    """Return hidden states, equal at all positions of a row, with what is to be wrong in them.

    What is added are whole numbers, so that the next blocks compute with it.
    asked: the bytes of what was asked. answered: the last answer of each shape; kept up here.
    """
    apart = torch.zeros(hidden.shape[0], dtype=hidden.dtype)
    if faults.hits_call(f.OtherWeights, asked):
        apart += MODULUS // 3
    for hit, size in (
        (dropping := faults.hits_call(f.TrainingMode, asked), dropping and dropping[0].dropout),
        (noisy := faults.hits_call(f.Noise, asked), noisy and noisy[0].size),
    ):
        if hit and size:
            apart += torch.tensor(
                [hit[1].choice((-1, 1)) * (1 + round(MODULUS * size * hit[1].random())) for _ in apart]
            )
    if apart.any():
        hidden = (hidden[:, 0, 0] + apart)[:, None, None].expand(hidden.shape)
    if flipped := faults.hits_call(f.FlippedBit, asked):
        row = flipped[1].randrange(hidden.shape[0])
        hidden = with_flipped_bit(hidden, row * hidden[0].numel(), flipped[0].bit)
    if faults.active(f.Swapped):
        shape = tuple(hidden.shape)
        before, answered[shape] = answered.get(shape), hidden
        if before is not None and faults.hits_call(f.Swapped):
            hidden = before
    return hidden


def tampered(faults: FaultSwitch, message: Message) -> Message:
    """Return the message that is sent in the place of another."""
    if faults.hits_call(f.NotFinite):
        message = replace(message, is_finite=False)
    if cut := faults.hits_call(f.Truncated):
        message = replace(message, nbytes=int(message.nbytes * cut[0].share_left))
    if large := faults.hits_call(f.Oversized):
        message = replace(message, nbytes=message.nbytes * large[0].times)
    if faults.hits_call(f.WrongShape):
        rows, positions, hidden_size = message.shape
        message = replace(message, shape=(rows, positions - 1, hidden_size))
    if faults.hits_call(f.WrongDtype):
        other = torch.float16 if message.dtype == torch.float32 else torch.float32
        message = replace(message, dtype=other)
    return message

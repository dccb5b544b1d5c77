"""Schedules of faults over a run, drawn by a seed."""

import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from petals_eval.local_swarm.faults.catalog import (
    FAULTS,
    AnyFault,
    ClaimsSpan,
    ClockSkew,
    Fault,
    FlippedBit,
    Hang,
    InfoOnly,
    Noise,
    NotFinite,
    Oversized,
    Refuse,
    Reset,
    Slow,
    Swapped,
    Truncated,
    VersionLie,
)

__all__ = ["Activation", "Schedule"]


class Activation(BaseModel):
    """A fault that is switched on `at` seconds after the schedule's start, on the server of this number."""

    model_config = ConfigDict(frozen=True)

    at: float
    server: int
    fault: AnyFault


class Schedule(BaseModel):
    """Faults over a run, in the order in which they are switched on."""

    model_config = ConfigDict(frozen=True)

    seed: int
    activations: tuple[Activation, ...]

    @classmethod
    def draw(
        cls,
        seed: int,
        *,
        servers: Sequence[int],
        num_blocks: int = 1,
        kinds: Sequence[type[Fault]] = FAULTS,
        count: int = 1,
        within: float = 2.0,
    ) -> "Schedule":
        """Draw `count` faults of these kinds, each switched on within so many seconds.

        servers: numbers of the servers that may be hit; none is hit twice while another was not.
        num_blocks: blocks of the model, for the fault that claims others.
        """
        draws = random.Random(f"petals-eval faults {seed}")
        order = draws.sample(list(servers), len(servers))
        activations = []
        for index in range(count):
            fault = _drawn(draws, draws.choice(list(kinds)), num_blocks)
            drawn = {"at": draws.uniform(0, within), "server": order[index % len(order)], "fault": fault}
            activations.append(Activation.model_validate(drawn))
        return cls(seed=seed, activations=tuple(sorted(activations, key=lambda each: each.at)))


def _drawn(draws: random.Random, kind: type[Fault], num_blocks: int) -> Fault:
    """Return a fault of this kind with drawn particulars."""
    fields: dict[str, object] = {"seed": draws.randrange(2**31), "after": draws.choice((0, 0, 1, 3))}
    if kind in (Hang, InfoOnly, Slow, Noise, FlippedBit, Swapped, Refuse, Reset, Truncated, NotFinite):
        fields["share"] = draws.choice((1.0, 1.0, 0.5))
    if kind is Hang:
        fields["where"] = draws.choice(("before", "middle"))
    elif kind is Slow:
        fields["delay"] = draws.uniform(0.1, 1.0)
    elif kind is Refuse:
        fields["reason"] = draws.choice(("overload", "batch_size", "not_served", "adapter", "cache"))
    elif kind is Noise:
        fields["size"] = draws.choice((0.01, 0.03, 0.1))
    elif kind is FlippedBit:
        fields["bit"] = draws.choice((0, 1, 2))
    elif kind is Oversized:
        fields["times"] = draws.choice((2, 16))
    elif kind is ClaimsSpan:
        start = draws.randrange(num_blocks)
        fields |= {"start": start, "stop": draws.randrange(start + 1, num_blocks + 1)}
    elif kind is VersionLie:
        fields["version"] = draws.choice(("0.0.1", "2.2.0", "99.0", "\x1b[31mred"))
    elif kind is ClockSkew:
        fields["seconds_off"] = draws.choice((-3600.0, 3600.0))
    return kind.model_validate(fields)

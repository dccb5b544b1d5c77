"""What can be wrong with a server of the local swarm, one small description a fault, and schedules of them by seed."""

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "FAULTS",
    "OVER_SESSIONS",
    "AnyFault",
    "ClaimsDtype",
    "ClaimsSpan",
    "ClockSkew",
    "Crash",
    "Fault",
    "Faults",
    "FlippedBit",
    "Hang",
    "Hits",
    "InfoOnly",
    "JoiningForEver",
    "LockedCache",
    "Noise",
    "NotFinite",
    "OtherLayout",
    "OtherWeights",
    "Oversized",
    "RecordWithoutServer",
    "Refuse",
    "Reset",
    "Schedule",
    "Slow",
    "StaleRecord",
    "Swapped",
    "Switched",
    "TrainingMode",
    "Truncated",
    "VersionLie",
    "WrongDtype",
    "WrongShape",
]


class Fault(BaseModel):
    """Which calls it hits, counted from when it is switched on. A call is one message asking for hidden states.

    share: of the calls, drawn by `seed`. after: calls that pass first. seconds: it lasts; None: until switched off.
    at_most: calls it hits. repeats: draw by what a call asks and not by its number, so that one question gets one
    answer, which a server's blocks in evaluation mode do as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=1.0, gt=0, le=1)
    after: int = Field(default=0, ge=0)
    seconds: float | None = Field(default=None, gt=0)
    at_most: int | None = Field(default=None, gt=0)
    repeats: bool = False
    seed: int = 0


# -- the server ends, is late, or does not answer


class Crash(Fault):
    """The process ends at once, in the middle of a call; its libp2p daemon with it."""

    name: Literal["crash"] = "crash"


class Hang(Fault):
    """No answer, for ever. where: before anything is computed, or in mid-answer: of a streamed one half is sent."""

    name: Literal["hang"] = "hang"
    where: Literal["before", "middle"] = "before"


class Slow(Fault):
    """Every answer comes late. delay: seconds."""

    name: Literal["slow"] = "slow"
    delay: float = Field(default=1.0, gt=0)


class Reset(Fault):
    """The connection to the client breaks when the answer is computed."""

    name: Literal["reset"] = "reset"


class InfoOnly(Fault):
    """rpc_info answers as ever; nothing else does."""

    name: Literal["info_only"] = "info_only"


class Refuse(Fault):
    """It answers with an error. words: Petals' own, which `text` can replace."""

    name: Literal["refuse"] = "refuse"
    words: Literal["overload", "batch_size", "not_served", "adapter", "cache"] = "overload"
    text: str | None = None


class LockedCache(Fault):
    """No session opens, for the lock of its cache is lost (`local_swarm.server.cache_budget`). All else goes on.

    A call, to it, is the opening of a session.
    """

    name: Literal["locked_cache"] = "locked_cache"


# -- the message is malformed


class Truncated(Fault):
    """The tensor's bytes end early. share_left: of them that are sent."""

    name: Literal["truncated"] = "truncated"
    share_left: float = Field(default=0.5, ge=0, lt=1)


class Oversized(Fault):
    """The tensor holds more bytes than its shape. times: as many."""

    name: Literal["oversized"] = "oversized"
    times: int = Field(default=4, ge=2)


class WrongShape(Fault):
    """The answer has one position too few, and says so."""

    name: Literal["wrong_shape"] = "wrong_shape"


class WrongDtype(Fault):
    """The answer is in another dtype than rpc_info names: float16, or float32 where that is its own."""

    name: Literal["wrong_dtype"] = "wrong_dtype"


# -- the message is well formed, and wrong


class NotFinite(Fault):
    """One value is not a number."""

    name: Literal["not_finite"] = "not_finite"


class FlippedBit(Fault):
    """One bit of one value is flipped. bit: counted from the sign, 0; 1 is the exponent's highest."""

    name: Literal["flipped_bit"] = "flipped_bit"
    bit: int = Field(default=1, ge=0, lt=16)
    repeats: bool = True


class Noise(Fault):
    """Normal noise on every value. size: relative to the root mean square of a token's hidden states."""

    name: Literal["noise"] = "noise"
    size: float = Field(default=0.01, gt=0)
    repeats: bool = True


class OtherWeights(Fault):
    """The blocks of another model of the same sizes: the rows of every matrix are in another order, drawn by `seed`."""

    name: Literal["other_weights"] = "other_weights"
    repeats: bool = True


class Swapped(Fault):
    """Each call gets the answer of the call of the same shape before it."""

    name: Literal["swapped"] = "swapped"


class TrainingMode(Fault):
    """The blocks drop out, as those of a Petals server do with their config's dropout."""

    name: Literal["training_mode"] = "training_mode"
    dropout: float = Field(default=0.1, gt=0, lt=1)


# -- what it says of itself is wrong; these hit announcements, and of `when` heed `seconds` alone


class StaleRecord(Fault):
    """Its record stays as it is while it serves the blocks no more."""

    name: Literal["stale_record"] = "stale_record"


class RecordWithoutServer(Fault):
    """Beside its own it announces the record of a peer that does not exist."""

    name: Literal["record_without_server"] = "record_without_server"


class ClaimsSpan(Fault):
    """It announces blocks first:last, whatever it holds."""

    name: Literal["claims_span"] = "claims_span"
    first: int = Field(ge=0)
    last: int = Field(gt=0)


class ClaimsDtype(Fault):
    """It announces this dtype, whatever it computes in. rpc_info says the truth."""

    name: Literal["claims_dtype"] = "claims_dtype"
    dtype: str = "bfloat16"


class VersionLie(Fault):
    """It announces this version of petals, and says so in rpc_info."""

    name: Literal["version_lie"] = "version_lie"
    version: str = "0.0.1"


class OtherLayout(Fault):
    """A step of a session has so many tensors, as rpc_info says, and is refused with the three of Petals.

    Some servers announce a version of Petals and mean other things by a step (BloomBee: ten tensors).
    """

    name: Literal["other_layout"] = "other_layout"
    tensors: int = Field(default=10, ge=0)


class ClockSkew(Fault):
    """Its records expire by a clock that is wrong. seconds_off: ahead of the others'; negative: behind.

    Its DHT node goes by this machine's clock: hivemind reads one clock for a whole process.
    """

    name: Literal["clock_skew"] = "clock_skew"
    seconds_off: float = 3600.0


class JoiningForEver(Fault):
    """It announces that it is about to join, and never more."""

    name: Literal["joining_for_ever"] = "joining_for_ever"


FAULTS: tuple[type[Fault], ...] = (
    Crash, Hang, Slow, Reset, InfoOnly, Refuse, LockedCache, Truncated, Oversized, WrongShape, WrongDtype, NotFinite,
    FlippedBit, Noise, OtherWeights, Swapped, TrainingMode, StaleRecord, RecordWithoutServer, ClaimsSpan, ClaimsDtype,
    VersionLie, OtherLayout, ClockSkew, JoiningForEver,
)  # fmt: skip
OVER_SESSIONS: tuple[type[Fault], ...] = (LockedCache, OtherLayout)
"""Those that nobody meets who opens no session."""

AnyFault = Annotated[
    Crash | Hang | Slow | Reset | InfoOnly | Refuse | LockedCache | Truncated | Oversized | WrongShape | WrongDtype
    | NotFinite | FlippedBit | Noise | OtherWeights | Swapped | TrainingMode | StaleRecord | RecordWithoutServer
    | ClaimsSpan | ClaimsDtype | VersionLie | OtherLayout | ClockSkew | JoiningForEver,
    Field(discriminator="name"),
]  # fmt: skip

Faults: TypeAdapter[tuple[AnyFault, ...]] = TypeAdapter(tuple[AnyFault, ...])
"""Reads and writes them as JSON, for servers in processes of their own."""


class Hits(BaseModel):
    """times: the fault acted. in_flight: of these, with a client's call under way. For tests: nothing else reads it."""

    times: int = 0
    in_flight: int = 0


class Switched(BaseModel):
    """When a schedule switches what on. at: seconds from its start. server: its number."""

    model_config = ConfigDict(frozen=True)

    at: float
    server: int
    fault: AnyFault


class Schedule(BaseModel):
    """Faults over a run, drawn by a seed."""

    model_config = ConfigDict(frozen=True)

    seed: int
    switched: tuple[Switched, ...]

    @classmethod
    def of(
        cls,
        seed: int,
        *,
        servers: Sequence[int],
        span: tuple[int, int] = (0, 1),
        kinds: Sequence[type[Fault]] = FAULTS,
        count: int = 1,
        within: float = 2.0,
    ) -> "Schedule":
        """`count` faults of these kinds on these servers, switched on at some time within so many seconds.

        servers: numbers of those that may be hit; none is hit twice while another was not.
        span: of all blocks, for the fault that claims others.
        """
        draws = random.Random(f"petals-eval faults {seed}")
        order = draws.sample(list(servers), len(servers))
        switched = []
        for index in range(count):
            fault = _drawn(draws, draws.choice(list(kinds)), span)
            drawn = {"at": draws.uniform(0, within), "server": order[index % len(order)], "fault": fault}
            switched.append(Switched.model_validate(drawn))
        return cls(seed=seed, switched=tuple(sorted(switched, key=lambda each: each.at)))


def _drawn(draws: random.Random, kind: type[Fault], span: tuple[int, int]) -> Fault:
    """A fault of this kind with drawn particulars."""
    fields: dict[str, object] = {"seed": draws.randrange(2**31), "after": draws.choice((0, 0, 1, 3))}
    if kind in (Hang, InfoOnly, Slow, Noise, FlippedBit, Swapped, Refuse, Reset, Truncated, NotFinite):
        fields["share"] = draws.choice((1.0, 1.0, 0.5))
    if kind is Hang:
        fields["where"] = draws.choice(("before", "middle"))
    elif kind is Slow:
        fields["delay"] = draws.uniform(0.1, 1.0)
    elif kind is Refuse:
        fields["words"] = draws.choice(("overload", "batch_size", "not_served", "adapter", "cache"))
    elif kind is Noise:
        fields["size"] = draws.choice((0.01, 0.03, 0.1))
    elif kind is FlippedBit:
        fields["bit"] = draws.choice((0, 1, 2))
    elif kind is Oversized:
        fields["times"] = draws.choice((2, 16))
    elif kind is ClaimsSpan:
        first = draws.randrange(span[0], span[1])
        fields |= {"first": first, "last": draws.randrange(first + 1, span[1] + 1)}
    elif kind is VersionLie:
        fields["version"] = draws.choice(("0.0.1", "2.2.0", "99.0", "\x1b[31mred"))
    elif kind is ClockSkew:
        fields["seconds_off"] = draws.choice((-3600.0, 3600.0))
    return kind.model_validate(fields)

"""The faults that a server of the local swarm can have, each a small description that travels as JSON."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "FAULTS",
    "LOSSY_WIRE_FAULTS",
    "SESSION_FAULTS",
    "AnyFault",
    "BrokenDecoder",
    "ClaimsDtype",
    "ClaimsSpan",
    "ClockSkew",
    "Crash",
    "Fault",
    "FaultCount",
    "FaultList",
    "FlippedBit",
    "Hang",
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
    "Slow",
    "StaleRecord",
    "Swapped",
    "TrainingMode",
    "Truncated",
    "VersionLie",
    "WrongDtype",
    "WrongRollBack",
    "WrongShape",
]


class Fault(BaseModel):
    """One thing that is wrong with a server, and which of its calls it hits.

    A call is one message that asks for hidden states. Calls are counted from when the fault is switched on.
    share: the part of the calls that it hits, drawn by `seed`.
    after: how many calls it lets pass first.
    seconds: how long it lasts; None: until it is switched off.
    at_most: how many calls it hits in all; None: any number.
    repeats: whether the draw goes by what a call asks and not by its number, so that one question gets one answer, as
        it does from blocks in evaluation mode.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    share: float = Field(default=1.0, gt=0, le=1)
    after: int = Field(default=0, ge=0)
    seconds: float | None = Field(default=None, gt=0)
    at_most: int | None = Field(default=None, gt=0)
    repeats: bool = False
    seed: int = 0


# -- The server ends, is late, or does not answer.


class Crash(Fault):
    """The process ends at once, in the middle of a call, and its libp2p daemon with it."""

    name: Literal["crash"] = "crash"


class Hang(Fault):
    """The call never gets its answer.

    where: "before" anything is computed, or in the "middle" of the answer, when half of a streamed one is sent.
    """

    name: Literal["hang"] = "hang"
    where: Literal["before", "middle"] = "before"


class Slow(Fault):
    """The answer comes `delay` seconds late."""

    name: Literal["slow"] = "slow"
    delay: float = Field(default=1.0, gt=0)


class Reset(Fault):
    """The connection to the client breaks when the answer is computed."""

    name: Literal["reset"] = "reset"


class InfoOnly(Fault):
    """The server goes on answering rpc_info and answers nothing else."""

    name: Literal["info_only"] = "info_only"


_ERRORS = {
    "overload": "Server is overloaded: all handlers are busy",
    "batch_size": "Task size greater than max_batch_size (1), it can't be processed",
    "not_served": "Remote peer does not serve this block any more",
    "adapter": "adapter not found",
    "cache": "Could not allocate 1073741824 bytes, max cache size = 1024 bytes, 1024 already allocated",
}
"""The errors of Petals servers, word for word as far as clients read them."""


class Refuse(Fault):
    """The server answers with an error.

    reason: which of the errors of Petals' servers it is, word for word. text: the error's text instead of theirs.
    """

    name: Literal["refuse"] = "refuse"
    reason: Literal["overload", "batch_size", "not_served", "adapter", "cache"] = "overload"
    text: str | None = None

    @property
    def words(self) -> str:
        """The text of the error."""
        return self.text or _ERRORS[self.reason]


class LockedCache(Fault):
    """No session opens, because the lock of the cache is lost (`server.cache_budget`); all else goes on.

    A call, to this fault, is the opening of a session.
    """

    name: Literal["locked_cache"] = "locked_cache"


class WrongRollBack(Fault):
    """A session that is told to go back to a position goes back one further, and says nothing.

    A call, to this fault, is a step of a session that is told to go back.
    """

    name: Literal["wrong_roll_back"] = "wrong_roll_back"


class BrokenDecoder(Fault):
    """The server cannot read the 8-bit codes, as hivemind's decoders before 1.2 cannot under NumPy 2.4.

    A call, to this fault, is one whose hidden states come in such a code.
    """

    name: Literal["broken_decoder"] = "broken_decoder"


# -- The message is malformed.


class Truncated(Fault):
    """The tensor's bytes end early: only `share_left` of them are sent."""

    name: Literal["truncated"] = "truncated"
    share_left: float = Field(default=0.5, ge=0, lt=1)


class Oversized(Fault):
    """The tensor holds `times` as many bytes as its shape says."""

    name: Literal["oversized"] = "oversized"
    times: int = Field(default=4, ge=2)


class WrongShape(Fault):
    """The answer has one position too few, and says so."""

    name: Literal["wrong_shape"] = "wrong_shape"


class WrongDtype(Fault):
    """The answer is in another dtype than rpc_info names: in float16, or in float32 where float16 is named."""

    name: Literal["wrong_dtype"] = "wrong_dtype"


# -- The message is well formed, and wrong.


class NotFinite(Fault):
    """One value of the answer is not a number."""

    name: Literal["not_finite"] = "not_finite"


class FlippedBit(Fault):
    """One bit of one value is flipped. bit: 0 is the sign, 1 the highest bit of the exponent, and so on."""

    name: Literal["flipped_bit"] = "flipped_bit"
    bit: int = Field(default=1, ge=0, lt=16)
    repeats: bool = True


class Noise(Fault):
    """Every value has normal noise. size: relative to the root mean square of the token's hidden states."""

    name: Literal["noise"] = "noise"
    size: float = Field(default=0.01, gt=0)
    repeats: bool = True


class OtherWeights(Fault):
    """The blocks are those of another model of the same sizes: `seed` draws an order of the rows of every matrix."""

    name: Literal["other_weights"] = "other_weights"
    repeats: bool = True


class Swapped(Fault):
    """Each call gets the answer to the call of the same shape before it."""

    name: Literal["swapped"] = "swapped"


class TrainingMode(Fault):
    """The blocks drop out, as those of a Petals server do whose config has dropout."""

    name: Literal["training_mode"] = "training_mode"
    dropout: float = Field(default=0.1, gt=0, lt=1)


# -- What the server says of itself is wrong. These hit announcements, and heed only `seconds` of the fields of `Fault`.


class StaleRecord(Fault):
    """The record stays as it is while the server serves the blocks no more."""

    name: Literal["stale_record"] = "stale_record"


class RecordWithoutServer(Fault):
    """The server announces, beside its own record, that of a peer that does not exist."""

    name: Literal["record_without_server"] = "record_without_server"


class ClaimsSpan(Fault):
    """The server announces blocks start to stop (exclusive), whatever it holds."""

    name: Literal["claims_span"] = "claims_span"
    start: int = Field(ge=0)
    stop: int = Field(gt=0)


class ClaimsDtype(Fault):
    """The server announces `dtype`, whatever it computes in; its rpc_info tells the truth."""

    name: Literal["claims_dtype"] = "claims_dtype"
    dtype: str = "bfloat16"


class VersionLie(Fault):
    """The server names `version` as its version of petals, in its record and in rpc_info."""

    name: Literal["version_lie"] = "version_lie"
    version: str = "0.0.1"


class OtherLayout(Fault):
    """A step of a session has `tensors` tensors by rpc_info, and one with the three of Petals is refused.

    Some servers announce a version of Petals and mean other things by a step (BloomBee: ten tensors).
    """

    name: Literal["other_layout"] = "other_layout"
    tensors: int = Field(default=10, ge=0)


class ClockSkew(Fault):
    """The records expire by a clock that is wrong by `seconds_off`, which is negative for a clock that is slow.

    The server's DHT node goes by this machine's clock all the same: hivemind reads one clock for a whole process.
    """

    name: Literal["clock_skew"] = "clock_skew"
    seconds_off: float = 3600.0


class JoiningForEver(Fault):
    """The server announces that it is about to join, and never more than that."""

    name: Literal["joining_for_ever"] = "joining_for_ever"


AnyFault = Annotated[
    Crash | Hang | Slow | Reset | InfoOnly | Refuse | LockedCache | BrokenDecoder | Truncated | Oversized | WrongShape
    | WrongRollBack | WrongDtype | NotFinite | FlippedBit | Noise | OtherWeights | Swapped | TrainingMode | StaleRecord
    | RecordWithoutServer | ClaimsSpan | ClaimsDtype | VersionLie | OtherLayout | ClockSkew | JoiningForEver,
    Field(discriminator="name"),
]  # fmt: skip

FAULTS: tuple[type[Fault], ...] = get_args(get_args(AnyFault)[0])
SESSION_FAULTS: tuple[type[Fault], ...] = (LockedCache, OtherLayout, WrongRollBack)
"""The faults that only clients meet who open sessions."""

LOSSY_WIRE_FAULTS: tuple[type[Fault], ...] = (BrokenDecoder,)
"""The faults that only clients meet whose wire is lossy."""

FaultList: TypeAdapter[tuple[AnyFault, ...]] = TypeAdapter(tuple[AnyFault, ...])
"""Reads and writes faults as JSON, for servers in processes of their own."""


class FaultCount(BaseModel):
    """How often a fault acted. times: in all. in_flight: while a client's call was in flight.

    Tests and chaos schedules read it, to know that a fault was met and not only switched on.
    """

    times: int = 0
    in_flight: int = 0

"""A scenario: a swarm, the links to it, and the work that is sent through it. Data alone."""

from functools import lru_cache
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from petals_eval.config import SwarmSettings
from petals_eval.errors import ConfigError
from petals_eval.local_swarm.faults.schedule import Activation
from petals_eval.local_swarm.network import LinkProfile
from petals_eval.swarm.wire.span import Span

__all__ = ["Client", "Load", "Move", "Scenario", "Server"]

_PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"  # nobody asks it anything
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _span(value: object) -> object:
    return Span.parse(value) if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
Blocks = Annotated[Span, BeforeValidator(_span)]


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Move(_Described):
    """A server that holds other blocks from `at` on, in seconds from the start."""

    at: NotNegative
    blocks: Blocks


class Load(_Described):
    """Other people's work: from `since` to `until`, in seconds from the start, it takes a share of a server's pace."""

    since: NotNegative = 0.0
    until: Positive
    share: Annotated[float, Field(gt=0, lt=1)]


class Server(_Described):
    """One server, and the link between it and the client.

    blocks: what it holds. link: delays in seconds one way, rates in megabits per second.
    tokens_per_second: through all of its blocks; a part of them takes its share. call_seconds: that it computes for a
        call whatever it holds.
    max_tokens: in one call. cache_tokens: of one block, for sessions. version: of petals, as it says.
    claimed_pace: the tokens a second for a block that its record claims (`forward_rps`); None: no claim.
    joins: seconds from the start until it comes. leaves: until it ends without a word; None: it stays.
    returns: until it is there again under its old identity. moves: to other blocks. load: other people's.
    record_delay: seconds until what it announces is in the directory.
    """

    blocks: Blocks
    link: LinkProfile = LinkProfile()
    tokens_per_second: Positive
    call_seconds: NotNegative = 0.002
    max_tokens: Count = 8192
    cache_tokens: Count = 1 << 20
    version: str = "2.3.0.dev2"
    claimed_pace: Positive | None = None
    joins: NotNegative = 0.0
    leaves: Positive | None = None
    returns: Positive | None = None
    moves: tuple[Move, ...] = ()
    load: tuple[Load, ...] = ()
    record_delay: NotNegative = 0.0

    @model_validator(mode="after")
    def _times_are_in_order(self) -> Self:
        times = [each for each in (self.joins, self.leaves, self.returns) if each is not None]
        if times != sorted(times) or (self.returns is not None and self.leaves is None):
            raise ValueError("expected a server to join before it leaves, and to leave before it returns")
        return self

    @model_validator(mode="after")
    def _link_can_be(self) -> Self:
        link = self.link
        if min(link.delay, link.jitter) < 0 or any(
            rate is not None and rate <= 0 for rate in (link.up_mbps, link.down_mbps)
        ):
            raise ValueError(f"link: expected a delay and a jitter of at least 0 and rates above 0, found {link}")
        return self


class Client(_Described):
    """The client's machine.

    up_mbps, down_mbps: megabits per second of its own link, which all servers' links share; None: free.
    call_seconds, byte_seconds: of its processor for a call, and for a byte sent or received.
    """

    up_mbps: Positive | None = None
    down_mbps: Positive | None = None
    call_seconds: NotNegative = 0.001
    byte_seconds: NotNegative = 1e-9


class Scenario(_Described):
    """A swarm and what an evaluation sends through it.

    blocks: of the model. hidden_size: values of a position. dtype: of the servers.
    rows: to be evaluated. tokens: the least and the most positions of one, prompt included; each is drawn by `seed`,
        as is all that is left to chance.
    tokens_per_micro_batch: positions that are sent at once; None: found out.
    clients: such as ours that evaluate all rows at the same time, each over a link of its own.
    settings: of the client (`petals_eval.config.SwarmSettings`), where they are not the usual ones.
    announce_seconds: after which servers announce themselves again; records live for twice as long.
    faults: those of the stub (`petals_eval.local_swarm.faults`), switched on `at` seconds from the start.
    """

    blocks: Count
    hidden_size: Count
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    rows: Count
    tokens: tuple[Count, Count]
    servers: Annotated[tuple[Server, ...], Field(min_length=1)]
    tokens_per_micro_batch: Count | None = None
    client: Client = Client()
    clients: Count = 1
    settings: dict[str, Any] = {}
    announce_seconds: Positive = 60.0
    faults: tuple[Activation, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.tokens[0] > self.tokens[1]:
            raise ValueError(f"tokens: expected the least first, found {self.tokens[0]} before {self.tokens[1]}")
        for index, server in enumerate(self.servers):
            for span in (server.blocks, *(move.blocks for move in server.moves)):
                if span.stop > self.blocks:
                    found = f"server {index} with blocks {span}"
                    raise ValueError(f"servers: expected blocks of 0:{self.blocks}, found {found}")
        for each in self.faults:
            if not 0 <= each.server < len(self.servers):
                raise ValueError(f"faults: expected a server below {len(self.servers)}, found {each.server}")
        held = {block for server in self.servers for block in range(server.blocks.start, server.blocks.stop)}
        if missing := sorted(set(range(self.blocks)) - held):
            raise ValueError(f"servers: expected every block of 0:{self.blocks} to be held, found none of {missing}")
        try:
            _ = self.swarm_settings
        except ConfigError as error:
            raise ValueError(f"settings: {error}") from None
        return self

    @property
    def swarm_settings(self) -> SwarmSettings:
        """The settings of the client."""
        return SwarmSettings.model_validate({"initial_peers": (_PEER,), **self.settings})

    @property
    def lengths(self) -> tuple[int, ...]:
        """The positions of each row."""
        return _lengths(self.seed, self.rows, self.tokens)

    @property
    def bytes_per_position(self) -> int:
        """Bytes of a position's hidden states on the wire."""
        return self.hidden_size * _ITEMSIZES[self.dtype]


@lru_cache(maxsize=2)
def _lengths(seed: int, rows: int, tokens: tuple[int, int]) -> tuple[int, ...]:
    draws = Random(seed)
    return tuple(draws.randint(*tokens) for _ in range(rows))

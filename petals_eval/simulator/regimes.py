"""Swarms with a name, in which different things are what all waits for: measured on the real wire and simulated alike.

`scripts/bench_paced.py` makes each of them of paced servers behind an emulated network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from petals_eval.local_swarm.network import LinkProfile
from petals_eval.simulator.scenario import Client, Scenario, Server
from petals_eval.swarm.wire.span import Span

__all__ = ["PROMPT_TOKENS", "REGIMES", "regime"]

PROMPT_TOKENS = 8
"""Positions of a row before its text, in all of them."""
_BLOCKS = 8


def _server(start: int, stop: int, delay: float, mbps: float, tokens_per_second: float, jitter: float = 0.0) -> Server:
    return Server(
        blocks=Span(start, stop),
        link=LinkProfile(delay, jitter, mbps, mbps),
        tokens_per_second=tokens_per_second,
        claimed_pace=tokens_per_second * (stop - start),
    )


def _chain(hops: int, delay: float, mbps: float, tokens_per_second: float, jitter: float = 0.0) -> list[Server]:
    length = _BLOCKS // hops
    return [_server(at, at + length, delay, mbps, tokens_per_second, jitter) for at in range(0, _BLOCKS, length)]


@dataclass(frozen=True)
class _Regime:
    """tokens: the least and the most of a row's text, with the one in front."""

    hidden_size: int
    servers: Sequence[Server]
    rows: int
    tokens: tuple[int, int] = (16, 128)
    dtype: Literal["float32", "bfloat16"] = "float32"
    client: Client = field(default_factory=Client)


_UNEQUAL = ((0.02, 2_000), (0.05, 1_000), (0.1, 500))  # delays and paces of three replicas
_SHARED = _chain(4, 0.03, 200, 20_000)

_REGIMES = {
    # Those of the first table: links, servers and distances in turn, and replicas that are unequal in both.
    "link": _Regime(1024, _chain(4, 0.05, 20, 50_000), 256),
    "link16": _Regime(1024, _chain(4, 0.05, 20, 50_000), 256, dtype="bfloat16"),
    "server": _Regime(256, _chain(4, 0.02, 100, 2_000), 600),
    "latency": _Regime(64, _chain(8, 0.1, 100, 10_000), 2000, (16, 64)),
    "mixed": _Regime(
        64, [_server(at, at + 2, delay, 12.5, pace) for at in range(0, 8, 2) for delay, pace in _UNEQUAL], 1000
    ),
    # A link of the client's that all share.
    "uplink": _Regime(256, _SHARED, 600, client=Client(up_mbps=20, down_mbps=100)),
    "downlink": _Regime(256, _SHARED, 400, client=Client(up_mbps=100, down_mbps=30)),
    # Spans that overlap, and servers that each hold all.
    "overlap": _Regime(
        256,
        [
            _server(0, 5, 0.02, 50, 2_000),
            _server(3, 8, 0.02, 50, 2_000),
            _server(0, 3, 0.04, 50, 1_500),
            _server(5, 8, 0.04, 50, 1_500),
            _server(2, 6, 0.01, 50, 1_000),
        ],
        600,
    ),
    "whole": _Regime(
        256, [_server(0, 8, 0.02, 100, 2_000), _server(0, 8, 0.05, 50, 1_000), _server(0, 8, 0.01, 100, 500)], 600
    ),
    # One part of a chain that is unlike the others.
    "narrow": _Regime(256, [_server(at, at + 2, 0.03, 8 if at == 4 else 100, 20_000) for at in range(0, 8, 2)], 150),
    "slow": _Regime(128, [_server(at, at + 2, 0.03, 100, 800 if at == 2 else 10_000) for at in range(0, 8, 2)], 120),
    # The near one is slow, the far one quick.
    "far": _Regime(
        128,
        [_server(at, at + 4, *each) for at in (0, 4) for each in ((0.005, 50, 800), (0.15, 50, 3_000))],
        600,
    ),
    "jitter": _Regime(256, _chain(4, 0.04, 20, 10_000, jitter=0.03), 250),
    "near": _Regime(256, _chain(2, 0.001, 1_000, 3_000), 500),
    "long": _Regime(256, _chain(4, 0.03, 50, 10_000), 150, (300, 480)),
}

REGIMES = tuple(_REGIMES)


def regime(name: str, *, rows: int | None = None, seed: int = 0, **settings: object) -> Scenario:
    """Return a swarm by its name, of `REGIMES`. rows: to be evaluated; None: as many as take long enough.

    settings: of the client.
    """
    found = _REGIMES[name]
    least, most = found.tokens
    return Scenario(
        blocks=_BLOCKS,
        hidden_size=found.hidden_size,
        dtype=found.dtype,
        rows=rows or found.rows,
        tokens=(least + PROMPT_TOKENS, most + PROMPT_TOKENS),
        servers=tuple(found.servers),
        client=found.client,
        settings=settings,
        seed=seed,
    )

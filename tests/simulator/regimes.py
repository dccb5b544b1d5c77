"""Swarms of which it is known from the real wire what the client makes of them."""

from petals_eval.local_swarm.network import LinkProfile
from petals_eval.simulator.scenario import Client, Scenario, Server
from petals_eval.swarm.wire.span import Span

_AROUND_A_TEXT = 9  # the prompt, and a token in front


def _server(start: int, stop: int, delay: float, mbps: float, tokens_per_second: float) -> Server:
    return Server(
        blocks=Span(start, stop),
        link=LinkProfile(delay, 0.0, mbps, mbps),
        tokens_per_second=tokens_per_second,
        claimed_pace=tokens_per_second * (stop - start),
    )


_MIXED = ((0.02, 2_000), (0.05, 1_000), (0.1, 500))

# hidden size, dtype, servers, rows, letters of a text
_REGIMES = {
    "link": (1024, "float32", [_server(at, at + 2, 0.05, 20, 50_000) for at in range(0, 8, 2)], 256, (16, 128)),
    "link16": (1024, "bfloat16", [_server(at, at + 2, 0.05, 20, 50_000) for at in range(0, 8, 2)], 256, (16, 128)),
    "server": (256, "float32", [_server(at, at + 2, 0.02, 100, 2_000) for at in range(0, 8, 2)], 600, (16, 128)),
    "latency": (64, "float32", [_server(at, at + 1, 0.1, 100, 10_000) for at in range(8)], 2000, (16, 64)),
    "mixed": (
        64,
        "float32",
        [_server(at, at + 2, delay, 12.5, pace) for at in range(0, 8, 2) for delay, pace in _MIXED],
        1000,
        (16, 128),
    ),
    "uplink": (256, "float32", [_server(at, at + 2, 0.03, 200, 20_000) for at in range(0, 8, 2)], 600, (16, 128)),
}


_CLIENTS = {"uplink": Client(up_mbps=20, down_mbps=100)}


def regime(name: str, *, seed: int = 0, **settings: object) -> Scenario:
    """Return a swarm by its name. settings: of the client."""
    hidden_size, dtype, servers, rows, (least, most) = _REGIMES[name]
    return Scenario(
        blocks=8,
        hidden_size=hidden_size,
        dtype=dtype,
        rows=rows,
        tokens=(least + _AROUND_A_TEXT, most + _AROUND_A_TEXT),
        servers=tuple(servers),
        client=_CLIENTS.get(name, Client()),
        settings=settings,
        seed=seed,
    )

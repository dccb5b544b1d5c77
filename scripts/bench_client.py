"""What the client itself costs: its processor time per byte moved, against a bare hivemind echo of the same bytes, and
the time from connecting to the first result.

    .venv/bin/python scripts/bench_client.py

The same micro-batches go to a hivemind peer that sends each message back, and through the blocks of a local swarm, in
turn. Servers and the echo are processes of their own; counted are this process and its libp2p daemon (p2pd). The echo
is measured twice: with the daemon as hivemind starts it, and with it as this client does.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from bench_workloads import make_llama  # noqa: E402
from hivemind.p2p import P2P, PeerID, ServicerBase  # noqa: E402
from hivemind.p2p.p2p_daemon import P2PContext  # noqa: E402
from hivemind.proto import runtime_pb2  # noqa: E402

from petals_eval.bench.processes import processor_seconds, tree  # noqa: E402
from petals_eval.bench.statistics import Spread  # noqa: E402
from petals_eval.config import SwarmSettings  # noqa: E402
from petals_eval.local_swarm import LocalSwarm  # noqa: E402
from petals_eval.swarm import RemoteSequential, SwarmConnection, Work  # noqa: E402
from petals_eval.swarm.transport.daemon import start_daemon  # noqa: E402

HIDDEN = 256
IN_FLIGHT = 8


class Echo(ServicerBase):
    """Gives back what it is given."""

    async def rpc_echo(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
        return runtime_pb2.ExpertResponse(tensors=request.tensors)


async def serve() -> None:
    """The other end, until stdin ends. Prints its address."""
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"], auto_nat=False, nat_port_map=False)
    await Echo().add_p2p_handlers(p2p)
    address = (await p2p.get_visible_maddrs())[0]
    print(json.dumps({"maddr": str(address), "peer_id": p2p.peer_id.to_base58()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await p2p.shutdown()


async def echo(peer: dict, size: int, messages: int, start: Callable[..., Awaitable[P2P]]) -> float:
    """Send messages of `size` bytes and take them back; the processor seconds of this process and its daemon."""
    p2p = await start(
        initial_peers=[peer["maddr"]], dht_mode="client", no_listen=True, host_maddrs=None, auto_nat=False,
        nat_port_map=False,
    )  # fmt: skip
    stub = Echo.get_stub(p2p, PeerID.from_base58(peer["peer_id"]))
    request = runtime_pb2.ExpertRequest(uid="echo", tensors=[runtime_pb2.Tensor(buffer=os.urandom(size))])
    left = iter(range(messages))

    async def one_after_the_other() -> None:
        for _ in left:
            await stub.rpc_echo(request)

    pids = [os.getpid(), *(pid for pid in tree(os.getpid()) if _is_daemon(pid, p2p))]
    try:
        await stub.rpc_echo(request)
        before = processor_seconds(pids)
        await asyncio.gather(*(one_after_the_other() for _ in range(IN_FLIGHT)))
        return processor_seconds(pids) - before
    finally:
        await p2p.shutdown()


def _is_daemon(pid: int, p2p: P2P) -> bool:
    return p2p._child is not None and pid == p2p._child.pid


def ours(blocks: RemoteSequential, daemon: int, hidden: torch.Tensor, passes: int) -> float:
    """Send as many bytes through the blocks; the processor seconds of this process and its daemon."""
    work = (Work(number, hidden, None) for number in range(passes))
    pids = [os.getpid(), daemon]
    before = processor_seconds(pids)
    for _ in blocks.stream(work):
        pass
    return processor_seconds(pids) - before


@contextmanager
def echo_peer() -> Iterator[dict]:
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        process.wait(20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, default=224, help="of hidden states in a micro-batch (default: 224)")
    parser.add_argument("--megabytes", type=int, default=150, help="moved each way in one measurement (default: 150)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return 0
    torch.set_num_threads(1)
    size = arguments.kib << 10
    hops = 3
    messages = (arguments.megabytes << 20) // size // hops * hops
    hidden = torch.randn(1, size // (4 * HIDDEN), HIDDEN)
    with tempfile.TemporaryDirectory(prefix="bench-client-") as folder, echo_peer() as peer:
        model, _ = make_llama(Path(folder) / "model", hidden=HIDDEN, blocks=hops)
        with LocalSwarm(str(model), servers=hops) as swarm:
            started = time.perf_counter()
            with SwarmConnection.connect(SwarmSettings(initial_peers=tuple(swarm.initial_peers))) as connection:
                blocks = connection.remote_sequential(swarm.dht_prefix, hops)
                blocks(hidden)
                print(f"first result {time.perf_counter() - started:.2f} s after connecting began")
                daemon = connection.p2p._child.pid
                moved = 2 * messages * size / 1e6
                ours(blocks, daemon, hidden, 20)
                sides = {
                    "echo": lambda: asyncio.run(echo(peer, size, messages, P2P.create)),
                    "echo, our daemon": lambda: asyncio.run(echo(peer, size, messages, start_daemon)),
                    "ours": lambda: ours(blocks, daemon, hidden, messages // hops),
                }
                ratios: dict[str, list[float]] = {name: [] for name in sides if name != "ours"}
                for pair in range(arguments.pairs):
                    cost = {name: 1000 * sides[name]() / moved for name in sorted(sides, reverse=bool(pair % 2))}
                    for name, found in ratios.items():
                        found.append(cost["ours"] / cost[name])
                    print(f"{pair + 1:3}. " + ", ".join(f"{name} {each:.2f} ms/MB" for name, each in cost.items()))
    for name, found in ratios.items():
        print(f"processor time per byte, ours to {name}: {Spread.of(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

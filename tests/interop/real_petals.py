"""Real Petals servers for the tests: started for given spans, waited for until they serve, ended without a trace."""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import runtime_pb2

from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile
from tests.interop.server_kinds import PETALS, ServerKind, chosen_kind

HERE = Path(__file__).resolve().parent
ONLINE = 2
FREE_LINK = LinkProfile()


class TransformerConnectionHandler(ServicerBase):
    """The raw stub of a Petals server: hivemind addresses handlers by this class's name."""

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: object) -> runtime_pb2.ExpertInfo: ...

    async def rpc_forward(self, request: runtime_pb2.ExpertRequest, context: object) -> runtime_pb2.ExpertResponse: ...


def petals_environment(folder: Path) -> dict[str, str]:
    """Variables under which Petals runs: one thread, quiet, nothing fetched from or kept outside `folder`."""
    own = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parents[1]))),  # and this checkout
        "HOME": str(folder),  # DRIFT keeps a list of servers below it
        **{f"{name}_CACHE": str(folder / "cache") for name in ("PETALS", "DRIFT", "BLOOMBEE")},
        "HF_HUB_OFFLINE": "1",
        "HIVEMIND_LOGLEVEL": "INFO",  # its log lines say when it serves
        # Its version check would ask the internet: let it find a closed door at once.
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    return os.environ | own


class RealPetalsServer:
    """One server process with its children (handlers, DHT, p2pd), all in one process group.

    span: (first block, last block + 1). `address` and `peer_id` are known once it runs.
    """

    def __init__(
        self, python: str, kind: ServerKind, model_dir: Path, span: tuple[int, int], flags: Sequence[str], folder: Path
    ):
        self.span = span
        self.address: str | None = None
        self.folder = folder
        self._log = folder / "log"
        command = [python, str(HERE / "petals_server.py"), kind.package, str(model_dir)]
        command += ["--block_indices", f"{span[0]}:{span[1]}", "--identity_path", str(folder / "identity"), *flags]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=petals_environment(folder),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def peer_id(self) -> str:
        """Its libp2p identity, base58."""
        if self.address is None:
            raise RuntimeError("the server is not running yet")
        return self.address.rsplit("/", 1)[1]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def join(self, initial_peers: Sequence[str]) -> None:
        """Let it go on into the swarm of these peers, or into one of its own."""
        rest = ["--initial_peers", *initial_peers] if initial_peers else ["--new_swarm"]
        self._process.stdin.write(json.dumps(rest).encode() + b"\n")
        self._process.stdin.flush()

    def wait_for(self, pattern: str, deadline: float) -> re.Match:
        """Wait until its log holds `pattern`."""
        while True:
            alive = self._process.poll() is None
            if found := re.search(pattern, self.log()):
                return found
            if not alive or time.monotonic() > deadline:
                what = "took too long to start" if alive else f"ended with exit code {self._process.returncode}"
                tail = "\n".join(self.log().splitlines()[-60:])
                raise RuntimeError(f"the real Petals server for blocks {self.span} {what}. Its log ends:\n{tail}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and all its children, p2pd included, and wait until they are gone."""
        self.send(signal.SIGKILL)
        self._process.wait(timeout=30)
        self._process.stdin.close()
        deadline = time.monotonic() + 30
        while self.processes():
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes of group {self._process.pid} outlive SIGKILL")
            time.sleep(0.01)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers. Ended by `kill` or `thaw`."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def stop(self) -> None:
        """Ctrl-C, as an operator would: it announces OFFLINE and leaves."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=30)
        finally:
            self.kill()

    def send(self, number: int) -> None:
        """A signal to every process of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def processes(self) -> list[int]:
        """Ids of all processes of its group, less the zombies that wait for init."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self._process.pid and state not in "ZX":
                    found.append(int(stat.parent.name))
        return found


class RealPetalsSwarm:
    """Real Petals servers of `model_dir`, one for each span, as a context manager.

    dtype: what the servers compute in ("float32", "bfloat16").
    max_batch_size, inference_max_length: the servers' limits in tokens; None: Petals' own defaults.
    initial_peers: multiaddresses of a running swarm to join; None: the first server starts one.
    kind: what servers they are; None: the kind that the tests were asked to start.
    network: put a relay of this network, which must be running, before each server, which announces nothing else.
    links: the link of each server, or one profile for all of them.
    flags: more arguments of `run_server`.
    timeout: seconds for all servers together to be ready.
    """

    def __init__(
        self,
        model_dir: str | Path,
        spans: Sequence[tuple[int, int]],
        *,
        dht_prefix: str,
        dtype: str = "float32",
        max_batch_size: int | None = None,
        inference_max_length: int | None = None,
        initial_peers: Sequence[str] | None = None,
        network: EmulatedNetwork | None = None,
        links: LinkProfile | Sequence[LinkProfile] = FREE_LINK,
        flags: Sequence[str] = (),
        kind: ServerKind | None = None,
        timeout: float = 120,
    ):
        self.dht_prefix = dht_prefix
        self.servers: list[RealPetalsServer] = []
        self.model_dir = Path(model_dir)
        self._spans, self._timeout = list(spans), timeout
        self._joined = list(initial_peers or ())
        self.kind = kind or chosen_kind()
        family = json.loads((self.model_dir / "config.json").read_text())["model_type"]
        if family not in self.kind.families:
            pytest.skip(f"{self.kind.name} does not serve {family} as Petals does")
        self._python = self.kind.find_python()
        self._dtype = dtype
        self._flags = list(flags)
        self._network = network
        self._links = [links] * len(self._spans) if isinstance(links, LinkProfile) else list(links)
        for flag, value in (("--max_batch_size", max_batch_size), ("--inference_max_length", inference_max_length)):
            if value is not None:
                self._flags += [flag, str(value)]

    def __enter__(self) -> "RealPetalsSwarm":
        self._folder = Path(tempfile.mkdtemp(prefix="real-petals-"))
        try:
            self._start(self._spans, self._dtype)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.send(signal.SIGKILL)  # to all first: waiting for the processor one by one takes longer
        for server in self.servers:
            server.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def initial_peers(self) -> list[str]:
        """Where to enter the swarm."""
        return self._joined or [self.servers[0].address]

    def add_server(self, span: tuple[int, int], *, dtype: str | None = None) -> RealPetalsServer:
        """Start one more server and wait until it serves."""
        return self._start([span], dtype or self._dtype)[0]

    def _start(self, spans: Sequence[tuple[int, int]], dtype: str) -> list[RealPetalsServer]:
        deadline = time.monotonic() + self._timeout
        flags = [
            *("--dht_prefix", self.dht_prefix, "--torch_dtype", dtype, "--device", "cpu", "--num_handlers", "1"),
            *("--throughput", "10", "--no_auto_relay", *self.kind.flags, *self._flags),
        ]
        new = []
        for span in spans:
            folder = self._folder / str(len(self.servers))
            folder.mkdir()
            place = self._place(len(self.servers))
            new.append(RealPetalsServer(self._python, self.kind, self.model_dir, span, [*flags, *place], folder))
            self.servers.append(new[-1])
        for server in new:
            first = server is self.servers[0]
            server.join(self._joined if first else self.initial_peers)
            if first:
                server.address = server.wait_for(_RUNNING, deadline)[1]
        for server in new:
            server.address = server.wait_for(_RUNNING, deadline)[1]
        for server in new:
            server.wait_for(r"\[INFO\] Started", deadline)
        in_own_loop(lambda: self._until_served(new, deadline))
        return new

    def _place(self, index: int) -> list[str]:
        """Where server number `index` listens, and what it announces instead; one added later has the last link."""
        if self._network is None:
            return ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
        relay, listen = self._network.before_server(self._links[min(index, len(self._links) - 1)])
        return ["--host_maddrs", listen, "--announce_maddrs", relay.maddr]

    async def _until_served(self, servers: Sequence[RealPetalsServer], deadline: float) -> None:
        """Until the directory says ONLINE for every block and every handler answers.

        ONLINE alone is not enough: Petals announces it before its handlers are up.
        """
        async with RawClient(self.initial_peers) as client:
            for server in servers:
                wanted = [f"{self.dht_prefix}.{block}" for block in range(*server.span)]
                while not await _serves(client, server.peer_id, wanted):
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"the real Petals server for blocks {server.span} is not announced in time")
                    await asyncio.sleep(0.1)


def run_petals_loop(
    settings: dict, folder: Path, timeout: float = 240, script: str = "petals_loop.py", kind: ServerKind = PETALS
) -> dict:
    """What petals_loop.py, or another script beside it, answers to `settings` with the client of this kind; `folder` is
    for its cache."""
    process = subprocess.Popen(
        [kind.find_python(), str(HERE / script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=petals_environment(folder) | {"CLIENT_PACKAGE": kind.package},
        start_new_session=True,
        text=True,
    )
    try:
        answer, log = process.communicate(json.dumps(settings), timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    if process.returncode:
        raise RuntimeError(f"{script} ended with exit code {process.returncode}. Its log ends:\n{log[-4000:]}")
    return json.loads(answer)


_RUNNING = r"Running a server on \['([^']+)'"


class RawClient:
    """hivemind alone, without our client: a DHT node and stubs of servers."""

    def __init__(self, initial_peers: Sequence[str]):
        self._initial_peers = list(initial_peers)

    async def __aenter__(self) -> "RawClient":
        self.p2p = await P2P.create(initial_peers=self._initial_peers, nat_port_map=False, auto_nat=False)
        self.node = await DHTNode.create(p2p=self.p2p, initial_peers=self._initial_peers, client_mode=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.node.shutdown()
        await self.p2p.shutdown()

    async def records(self, uids: Sequence[str]) -> dict[str, dict[str, tuple]]:
        """{uid: {peer id: (state, throughput, extra)}}, as the servers announced it last, whatever is cached."""
        found = await self.node.get_many(list(uids), sufficient_expiration_time=math.inf)
        return {
            uid: {peer: entry.value for peer, entry in value.value.items()} if value is not None else {}
            for uid, value in found.items()
        }

    def stub(self, peer_id: str) -> Any:
        return TransformerConnectionHandler.get_stub(self.p2p, PeerID.from_base58(peer_id))


async def _serves(client: RawClient, peer_id: str, uids: Sequence[str]) -> bool:
    records = await client.records(uids)
    if any(records[uid].get(peer_id, (0,))[0] != ONLINE for uid in uids):
        return False
    try:
        await client.stub(peer_id).rpc_info(runtime_pb2.ExpertUID(uid=uids[0]))
    except P2PHandlerError:
        return False
    return True


def in_own_loop(coroutine: Callable) -> Any:
    """Run a coroutine function to its end in a thread of its own, so that it works under a running loop as well."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = asyncio.run(coroutine())
        except BaseException as error:  # noqa: BLE001 (handed to the caller)
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def modes_line(path: Path, inputs: dict[str, list[list[int]]]) -> str:
    """A line for `save` that shows the two modes of the live model, and writes what was found to a file."""
    tensors = ", ".join(f"{name!r}: torch.tensor({values})" for name, values in inputs.items())
    made = f"__import__('petals_eval').modes(model, {{{tensors}}}, answers=3).to_json()"
    return f"open({str(path)!r}, 'w').write(__import__('json').dumps({made}))"

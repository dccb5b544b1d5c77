"""A bare client of the Petals wire: hivemind's own stub and serialization, nothing of the project's client."""

import asyncio
import contextlib
import uuid

import torch
from anyio.from_thread import start_blocking_portal
from hivemind.compression.serialization import (
    deserialize_tensor_stream,
    deserialize_torch_tensor,
    serialize_torch_tensor,
)
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from petals_eval.local_swarm.peer import Peer
from petals_eval.local_swarm.server.handler import BlockHandler

TIMEOUT = 60


class WireClient(contextlib.AbstractContextManager):
    """A peer in a swarm that calls its servers one RPC at a time."""

    def __init__(self, initial_peers):
        with contextlib.ExitStack() as opening:
            self._portal = opening.enter_context(start_blocking_portal("asyncio", name="client"))
            opening.callback(self._portal.call, self._portal.stop, True)
            self.peer = self.run(Peer.open(initial_peers))
            opening.callback(lambda: self.run(self.peer.close()))
            self._ending = opening.pop_all()

    def __exit__(self, *exc_details):
        self._ending.close()

    def run(self, call, seconds=TIMEOUT):
        """Run a coroutine in the client's event loop; raises TimeoutError after so many seconds."""
        return self._portal.call(asyncio.wait_for, call, seconds)

    def stub(self, peer_id):
        return BlockHandler.get_stub(self.peer.p2p, PeerID.from_base58(peer_id))

    def info(self, peer_id, uid=""):
        answer = self.run(self.stub(peer_id).rpc_info(runtime_pb2.ExpertUID(uid=uid)))
        return MSGPackSerializer.loads(answer.serialized_info)

    def tokens_left(self, peer_id):
        """Tokens that the server's cache has room for, times its blocks."""
        return self.info(peer_id)["cache_tokens_available"]

    def forward(self, peer_id, uid, hidden, prompts=None, **metadata):
        call = self.stub(peer_id).rpc_forward(request(uid, hidden, prompts, **metadata))
        return [deserialize_torch_tensor(tensor) for tensor in self.run(call).tensors]

    def forward_stream(self, peer_id, uid, hidden, prompts=None, **metadata):
        whole = request(uid, hidden, prompts, **metadata)
        return self.run(streamed(self.stub(peer_id).rpc_forward_stream, whole))

    def backward(self, peer_id, uid, hidden, grad_outputs, prompts=None, **metadata):
        call = self.stub(peer_id).rpc_backward(backward_request(uid, hidden, grad_outputs, prompts, **metadata))
        return [deserialize_torch_tensor(tensor) for tensor in self.run(call).tensors]

    def backward_stream(self, peer_id, uid, hidden, grad_outputs, prompts=None, **metadata):
        whole = backward_request(uid, hidden, grad_outputs, prompts, **metadata)
        return self.run(streamed(self.stub(peer_id).rpc_backward_stream, whole))

    def send(self, peer_id, message, method):
        """A request as it is, over rpc_forward or rpc_forward_stream; returns the tensors' messages, whole."""
        stub = self.stub(peer_id)
        if method == "forward":
            return list(self.run(stub.rpc_forward(message)).tensors)

        async def call():
            parts = [
                runtime_pb2.ExpertRequest(uid=message.uid, tensors=[part], metadata=message.metadata)
                for tensor in message.tensors
                for part in split_for_streaming(tensor, 1000)
            ]
            answers = await stub.rpc_forward_stream(as_aiter(*parts))
            return [combine_from_streaming([part async for answer in answers for part in answer.tensors])]

        return self.run(call())

    def record(self, key):
        """Subkeys and values found under `key`, freshest first."""
        found = self.run(self.peer.node.get(key, latest=True))
        return {} if found is None else {subkey: entry.value for subkey, entry in found.value.items()}

    def lifetimes(self, key):
        """Seconds each subkey of `key` still has."""
        from hivemind.utils.timed_storage import get_dht_time

        found = self.run(self.peer.node.get(key, latest=True))
        now = get_dht_time()
        return {subkey: entry.expiration_time - now for subkey, entry in found.value.items()}


async def streamed(rpc, whole):
    """Send a request in parts, as Petals' client sends a large one; returns the tensors of the answer."""
    parts = [
        runtime_pb2.ExpertRequest(uid=whole.uid, tensors=[part], metadata=whole.metadata)
        for tensor in whole.tensors
        for part in split_for_streaming(tensor, DEFAULT_MAX_MSG_SIZE)
    ]
    answers = await rpc(as_aiter(*parts))
    return await deserialize_tensor_stream(answer.tensors async for answer in answers)


def request(uid, hidden, prompts=None, **metadata):
    return _request(uid, [hidden, prompts], metadata)


def backward_request(uid, hidden, grad_outputs, prompts=None, **metadata):
    return _request(uid, [hidden, grad_outputs, prompts], metadata)


def _request(uid, tensors, metadata):
    marks = tuple(f"__T{index}".encode() for index in range(len(tensors)))
    metadata = {"points": 0, "active_adapter": "", "args_structure": (marks, {}), **metadata}
    return runtime_pb2.ExpertRequest(
        uid=uid,
        tensors=[serialize_torch_tensor(torch.empty(0) if tensor is None else tensor) for tensor in tensors],
        metadata=MSGPackSerializer.dumps(metadata),
    )


def chain(prefix, first, last):
    return " ".join(f"{prefix}.{block}" for block in range(first, last))


class WireSession(contextlib.AbstractContextManager):
    """A stream of rpc_inference to one server: `step` sends hidden states and waits for those that come back."""

    def __init__(self, client, peer_id, uid, **metadata):
        self.client, self.uid, self.metadata = client, uid, metadata
        self.session_id = metadata.setdefault("session_id", str(uuid.uuid4()))
        self.requests = asyncio.Queue()
        self.is_first = True
        self.responses = client.run(self._open(peer_id))

    async def _open(self, peer_id):
        async def requests():
            while (message := await self.requests.get()) is not None:
                yield message
                if not message.tensors:  # hivemind waits for this side before it ends the other
                    return

        return await self.client.stub(peer_id).rpc_inference(requests())

    def send(self, hidden, prompts=None, hypo_ids=None, **metadata):
        """Send a step without waiting for what comes back."""
        step = {"session_id": self.session_id, "step_id": str(uuid.uuid4())} | metadata
        if self.is_first:
            step = self.metadata | step
            self.is_first = False
        hypo_ids = torch.empty(0, dtype=torch.int64) if hypo_ids is None else hypo_ids
        tensors = [hidden, torch.empty(0) if prompts is None else prompts, hypo_ids]
        step.setdefault("args_structure", ((b"__T0", b"__T1", b"__T2"), {}))
        self._put(
            runtime_pb2.ExpertRequest(
                uid=self.uid,
                tensors=[serialize_torch_tensor(tensor) for tensor in tensors],
                metadata=MSGPackSerializer.dumps(step),
            )
        )

    def receive(self, timeout=TIMEOUT):
        """The next output; None when the server has ended the stream."""

        async def receive():
            # Under hivemind a stream that the other side has closed may also end as a broken pipe of our own writer.
            with contextlib.suppress(ConnectionError):
                return await anext(self.responses, None)
            return None

        response = self.client.run(receive(), timeout)
        return None if response is None else deserialize_torch_tensor(response.tensors[0])

    def step(self, *args, **metadata):
        self.send(*args, **metadata)
        return self.receive()

    def finish(self):
        """End the session as Petals' client does, and wait until the server has ended it too."""
        self._put(runtime_pb2.ExpertRequest())
        assert self.receive() is None

    def hang_up(self):
        """Vanish without a word."""
        self.client.run(self.responses.aclose())

    def _put(self, message):
        async def put():
            await self.requests.put(message)

        self.client.run(put())

    def __exit__(self, *exc_details):
        self.hang_up()

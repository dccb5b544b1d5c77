"""Servers of a small model that can be wrong, and a pipeline over them whose answers are checked."""

import asyncio
import math

import torch
from petals_eval.swarm.trust.unequal import unequal_by

from petals_eval.errors import PeerUnreachableError
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.transport.client import Answer
from petals_eval.swarm.trust.audit import VerifiedCalls
from tests.swarm.fakes import FakeDirectory, server, settings

SIZE = 32
BLOCKS = 4


class Servers:
    """Servers of a model of residual blocks, each in the dtype it announces; `spoil[name]` changes its answers."""

    def __init__(self):
        self.weights = torch.randn(BLOCKS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / math.sqrt(SIZE)
        self.spoil = {}
        self.down = set()
        self.hanging = set()
        self.calls = []

    def truth(self, hidden, first, last, dtype=torch.float32, prompts=None):
        states = hidden.to(dtype)
        for block in range(first, last):
            if prompts is not None:
                states = states.clone()
                states[:, : prompts.shape[2]] += prompts[block - first].to(dtype)
            normed = torch.nn.functional.layer_norm(states, states.shape[-1:])
            states = states + 0.3 * torch.tanh(normed @ self.weights[block].to(dtype))
        return states

    async def forward(self, hop, hidden, prompts, *, lossless=False):
        name = hop.server.peer_id
        self.calls.append((name, hop.first, hop.last))
        await asyncio.sleep(0)
        if name in self.down:
            raise PeerUnreachableError("gone")
        if name in self.hanging:
            await asyncio.sleep(3600)
        dtype = getattr(torch, hop.server.record.torch_dtype or "float32")
        answer = self.truth(hidden, hop.first, hop.last, dtype, prompts)
        if name in self.spoil:
            answer = self.spoil[name](answer, hidden)
        return Answer(answer, 0.001, 8, 8)

    async def forward_in_steps(self, hop, hidden, prompts, step):
        return await self.forward(hop, hidden, prompts)

    def forget(self, peer_id):
        pass


def noise(size=0.01, seed=0, repeats=True):
    """Of a relative size; the same for the same question."""
    sequence = torch.Generator().manual_seed(seed)

    def spoil(answer, question):
        asked = int(question.double().abs().sum() * 1e6) % 2**31
        draws = torch.Generator().manual_seed(seed + asked) if repeats else sequence
        usual = answer.float().square().mean(dim=-1, keepdim=True).sqrt()
        return (answer + size * usual * torch.randn(answer.shape, generator=draws)).to(answer.dtype)

    return spoil


def states(seed, rows=2, positions=8):
    return torch.randn(rows, positions, SIZE, generator=torch.Generator().manual_seed(seed))


class Run:
    """A pipeline over servers; `go` sends micro-batches through it, and settles."""

    def __init__(self, calls, *servers, seed=0, **values):
        chosen = settings(**{"deadline": 2, "min_backoff": 0.001, **values})
        self.calls = calls
        self.directory = FakeDirectory(BLOCKS, *servers)
        self.peers = PeerBook(chosen)
        self.verified = VerifiedCalls(calls, self.directory, self.peers, chosen, seed=seed)
        self.pipe = Pipeline(self.verified, self.directory, self.peers, chosen)
        self.verified.on_finding = lambda finding: self.pipe.distrust.note(unequal_by(finding))

    def go(self, count=20, at_once=4, prompts=None, last=BLOCKS):
        async def everything():
            turns = asyncio.Semaphore(at_once)

            async def one(seed):
                async with turns:
                    return await self.pipe.forward(states(seed), prompts, 0, last)

            answers = await asyncio.gather(*(one(seed) for seed in range(count)))
            await self.verified.settle()
            return answers

        return asyncio.run(everything())

    @property
    def verdicts(self):
        return {each.server.peer_id: each.verdict for each in self.pipe.status().unequal}

    @property
    def notices(self):
        return self.pipe.status().notices


def float32(name, first=0, last=BLOCKS):
    return server(name, first, last, torch_dtype="float32")


def bfloat16(name, first=0, last=BLOCKS):
    return server(name, first, last, torch_dtype="bfloat16")

"""InferenceSession: the synchronous face of a session over the swarm's key-value caches."""

from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import TracebackType

import torch

from petals_eval.errors import CallerError, SwarmError
from petals_eval.swarm.activations import refuse_gradients
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.sessions.route_session import RouteSession
from petals_eval.swarm.transport.rpc import ServedHop

__all__ = ["InferenceSession"]


class InferenceSession:
    """Blocks computed step by step, each step after the positions before it.

        with blocks.inference_session(max_length=512) as session:
            hidden = session.step(hidden, prompts)      # (1, seq, hidden): the first positions, with deep prompts
            hidden = session.step(next_hidden)          # (1, 1, hidden): one more
            session.position = 3                        # roll back: forget all but the first three
            hidden = session.step(other_hidden)

    A server that fails in mid-session is replaced: what entered its blocks is kept and computed anew elsewhere. Rolling
    back gives the same answers on servers that cannot do it (Petals 2.2.0), only slower.
    """

    def __init__(self, loop: EventLoop, route: RouteSession):
        self._loop = loop
        self._route = route
        self._is_closed = False

    def step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run hidden (batch, seq, hidden) after the positions so far; the same shape, dtype and device come back.

        Zero positions compute nothing and reserve the servers' caches.
        prompts: (blocks, batch or 1, prefix, hidden), added to the session's first positions before each block; at
            position 0 only.
        hypo_ids: int64 (batch,): row i goes on from what row hypo_ids[i] was (beam search).
        Raises GradientError, CallerError, RequestTooLargeError above max_length or what the servers' caches take, and
        SwarmError when the swarm cannot. After an error the session is where it was before the step.
        """
        future = self.start_step(hidden, prompts, hypo_ids)
        try:
            answer = future.result()
        except BaseException:
            future.cancel()
            raise
        return answer.to(device=hidden.device, dtype=hidden.dtype)

    def start_step(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> "Future[torch.Tensor]":
        """Start a step and return at once: so one thread drives many sessions.

        The future has what `step` returns or raises, but as the last server answered: on the CPU, in its dtype.
        Cancelling the future cancels the step. A step that is started before the last one is done waits for it.
        """
        if self._is_closed:
            raise CallerError("the session is closed: open another one")
        refuse_gradients(hidden, prompts)
        return self._loop.start(
            self._route.step,
            hidden.detach().cpu(),
            None if prompts is None else prompts.detach().cpu(),
            None if hypo_ids is None else hypo_ids.cpu(),
        )

    @property
    def position(self) -> int:
        """Positions computed so far. Set it to fewer to roll back; raises CallerError for more."""
        return self._route.position

    @position.setter
    def position(self, position: int) -> None:
        self.roll_back(position)

    def roll_back(self, position: int) -> None:
        """Forget all but the first `position` positions. Raises CallerError for more than there are."""
        self._route.roll_back(position)

    @property
    def max_length(self) -> int:
        """Positions each row may have."""
        return self._route.max_length

    @property
    def batch(self) -> int:
        """Rows."""
        return self._route.rows

    @property
    def servers(self) -> tuple[str, ...]:
        """Peer ids along the route, in order; empty before the first step."""
        return self._route.peer_ids

    @property
    def hops(self) -> tuple[ServedHop, ...]:
        """Who computed any part of it so far, those that were replaced among them."""
        return self._route.hops

    @property
    def seconds_waiting(self) -> float:
        """How long the step under way has been waiting for a server that opens a session; 0 when it is not."""
        return self._route.seconds_waiting

    def close(self) -> None:
        """End the session on every server. Safe to call twice, and after the connection is closed."""
        if self._is_closed:
            return
        with suppress(SwarmError):  # the connection is closed or lost, and with it every stream
            self.start_close().result()

    def start_close(self, *, may_audit: bool = False) -> "Future[None]":
        """Begin to end the session on every server and return at once; the future is done when they have let go of it.

        may_audit: let a share of what its servers computed be computed elsewhere, too, as of ordinary calls.
        Raises SwarmError, here or in the future, where the connection is closed or lost.
        """
        self._is_closed = True
        return self._loop.start(partial(self._route.close, may_audit=may_audit))

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

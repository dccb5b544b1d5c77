"""InferenceSession: the synchronous face of a session over the swarm's key-value caches."""

from contextlib import suppress
from types import TracebackType

import torch

from petals_eval.errors import CallerError, SwarmError
from petals_eval.swarm.activations import refuse_gradients
from petals_eval.swarm.event_loop import EventLoop
from petals_eval.swarm.sessions.route_session import RouteSession

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
        if self._is_closed:
            raise CallerError("the session is closed: open another one")
        refuse_gradients(hidden, prompts)
        answer = self._loop.run(
            self._route.step,
            hidden.detach().cpu(),
            None if prompts is None else prompts.detach().cpu(),
            None if hypo_ids is None else hypo_ids.cpu(),
        )
        return answer.to(device=hidden.device, dtype=hidden.dtype)

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

    def close(self) -> None:
        """End the session on every server. Safe to call twice, and after the connection is closed."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(SwarmError):  # the connection is closed or lost, and with it every stream
            self._loop.run(self._route.close)

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""A swarm on this machine: real blocks behind the wire of Petals, for tests, demos and benchmarks."""

from petals_eval.local_swarm.handles import LocalServer
from petals_eval.local_swarm.launcher import LocalSwarm

__all__ = ["LocalServer", "LocalSwarm"]

"""A swarm on this machine: real blocks behind the wire of Petals, for tests, demos and benchmarks."""

from petals_eval.local_swarm.launcher import LocalSwarm
from petals_eval.local_swarm.servers import LocalServer

__all__ = ["LocalServer", "LocalSwarm"]

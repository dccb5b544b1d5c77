"""What is remote: the wire, the directory, routes, calls, and RemoteSequential, the module face of it all."""

from petals_eval.swarm.connection import SwarmConnection
from petals_eval.swarm.pipeline import ServedHop, SwarmStatus
from petals_eval.swarm.remote_sequential import Computed, RemoteSequential, Work
from petals_eval.swarm.sessions.inference_session import InferenceSession

__all__ = ["Computed", "InferenceSession", "RemoteSequential", "ServedHop", "SwarmConnection", "SwarmStatus", "Work"]

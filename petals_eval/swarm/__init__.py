"""What is remote: the wire, the directory, routes, calls, and RemoteSequential, the module face of it all.

Names are imported when first used: whoever needs a `Span` of the wire need not wait for hivemind.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals_eval.swarm.connection import SwarmConnection
    from petals_eval.swarm.micro_batch import Computed, Work
    from petals_eval.swarm.pipeline import ServedHop, SwarmStatus
    from petals_eval.swarm.remote_sequential import RemoteSequential
    from petals_eval.swarm.sessions.inference_session import InferenceSession

__all__ = ["Computed", "InferenceSession", "RemoteSequential", "ServedHop", "SwarmConnection", "SwarmStatus", "Work"]

_HOMES = {
    "SwarmConnection": "connection",
    **dict.fromkeys(("ServedHop", "SwarmStatus"), "pipeline"),
    **dict.fromkeys(("Computed", "Work"), "micro_batch"),
    "RemoteSequential": "remote_sequential",
    "InferenceSession": "sessions.inference_session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petals_eval.swarm' has no attribute {name!r}")
    return getattr(import_module(f"petals_eval.swarm.{_HOMES[name]}"), name)

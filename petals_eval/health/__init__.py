"""Is a swarm fit for work now, which blocks are thin, and which servers do not do what they say?

Names are imported when first used: the command's help reads the settings and need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petals_eval.health.check import check_health
    from petals_eval.health.findings import FINDINGS
    from petals_eval.health.results import SCHEMA_VERSION, Finding, HealthReport, ModelHealth, ServerHealth, Verdict
    from petals_eval.health.settings import HealthSettings, Level

_HOMES = {
    "check_health": "check",
    "FINDINGS": "findings",
    **dict.fromkeys(("SCHEMA_VERSION", "Finding", "HealthReport", "ModelHealth", "ServerHealth", "Verdict"), "results"),
    **dict.fromkeys(("HealthSettings", "Level"), "settings"),
}

__all__ = [
    "FINDINGS",
    "SCHEMA_VERSION",
    "Finding",
    "HealthReport",
    "HealthSettings",
    "Level",
    "ModelHealth",
    "ServerHealth",
    "Verdict",
    "check_health",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petals_eval.health' has no attribute {name!r}")
    return getattr(import_module(f"petals_eval.health.{_HOMES[name]}"), name)

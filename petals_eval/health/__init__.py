"""Is a swarm fit for work now, which blocks are thin, and which servers do not do what they say?"""

from petals_eval.evaluation.estimate import outlook
from petals_eval.health.check import check_health
from petals_eval.health.findings import FINDINGS
from petals_eval.health.results import (
    SCHEMA_VERSION,
    Finding,
    HealthReport,
    ModelHealth,
    ServerHealth,
    Verdict,
)
from petals_eval.health.settings import HealthSettings, Level

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
    "outlook",
]

"""The run folder: what a run was, every example it scored, and what came of it."""

from petals_eval.runs.folder import RunFolder
from petals_eval.runs.group_result import GroupMean, GroupResult
from petals_eval.runs.journal import Counts, Failure, Journal
from petals_eval.runs.manifest import (
    AdapterRecord,
    DataRecord,
    LosslessServer,
    Manifest,
    ModelRecord,
    NoiseRecord,
    NoisyServer,
    Recomputed,
    ServerUsed,
    WireRecord,
    WireSample,
    difference,
)
from petals_eval.runs.noise import NumericalNoise
from petals_eval.runs.results import (
    WITHOUT_PROMPTS,
    AdapterResult,
    ComputedIn,
    RunResult,
    computed_in,
    over_draws,
    run_result,
    summarise,
)
from petals_eval.runs.shard import Shard

__all__ = [
    "WITHOUT_PROMPTS",
    "AdapterRecord",
    "AdapterResult",
    "ComputedIn",
    "Counts",
    "DataRecord",
    "Failure",
    "GroupMean",
    "GroupResult",
    "Journal",
    "LosslessServer",
    "Manifest",
    "ModelRecord",
    "NoiseRecord",
    "NoisyServer",
    "NumericalNoise",
    "Recomputed",
    "RunFolder",
    "RunResult",
    "ServerUsed",
    "Shard",
    "WireRecord",
    "WireSample",
    "computed_in",
    "difference",
    "over_draws",
    "run_result",
    "summarise",
]

"""The run folder: what a run was, every example it scored, and what came of it."""

from petals_eval.runs.folder import RunFolder
from petals_eval.runs.journal import Counts, Failure, Journal
from petals_eval.runs.manifest import (
    AdapterRecord,
    DataRecord,
    LosslessServer,
    Manifest,
    ModelRecord,
    NoisyServer,
    ServerUsed,
    WireRecord,
    WireSample,
    difference,
)
from petals_eval.runs.results import (
    WITHOUT_PROMPTS,
    AdapterResult,
    ComputedIn,
    RunResult,
    computed_in,
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
    "Journal",
    "LosslessServer",
    "Manifest",
    "ModelRecord",
    "NoisyServer",
    "RunFolder",
    "RunResult",
    "ServerUsed",
    "Shard",
    "WireRecord",
    "WireSample",
    "computed_in",
    "difference",
    "run_result",
    "summarise",
]

"""What servers claim of their speed may be any number: the estimate is a line of words all the same."""

import pytest

from petals_eval.evaluation.estimate import estimate_generation, estimate_run
from petals_eval.swarm.wire.records import ServerRecord, Snapshot, SpanServer
from petals_eval.swarm.wire.span import Span


@pytest.mark.parametrize("claim", [1.7e308, 1e300, 1e-3, 1e-200, 5e-324])
def test_any_claim_makes_a_short_line(claim: float) -> None:
    record = ServerRecord(state=2, throughput=claim, inference_rps=claim)
    snapshot = Snapshot(3, {each: SpanServer(each, Span(0, 3), record) for each in ("a", "b")})
    for line in (estimate_run(snapshot, 10_000), estimate_generation(snapshot, 10_000)):
        assert len(line) < 200 and "inf" not in line and "nan" not in line
    if claim < 1e-100:
        assert "about more than a century" in estimate_run(snapshot, 10_000)

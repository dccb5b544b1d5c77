"""Every fault under its own name, and none of them green. At the seam: no network."""

import pytest
import torch

from petals_eval.errors import (
    PeerAnswerError,
    PeerNoSessionError,
    PeerNotFiniteError,
    PeerTimeoutError,
    PeerUnreachableError,
)
from petals_eval.health import FINDINGS, Level, Verdict
from petals_eval.health.findings import from_forward_error
from petals_eval.swarm.wire import messages as wire
from tests.support.fake_health import (
    HIDDEN,
    REFUSED,
    FakeServer,
    FakeSwarm,
    findings,
    good,
    info_of,
    noisy,
    raising,
    report_on,
    server_of,
)


def training(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(hidden, 0.1)


FAULTS = {
    "joining": (FakeServer(0, 4, state=1), Verdict.DEGRADED),
    "stale-record": (FakeServer(0, 4, remaining=70.0), Verdict.DEGRADED),
    "wrong-span": (FakeServer(0, 9), Verdict.BROKEN),
    "record-without-server": (
        FakeServer(0, 4, info=raising(PeerUnreachableError("routing: not found"))),
        Verdict.BROKEN,
    ),
    "unreachable": (FakeServer(0, 4, info=raising(PeerUnreachableError("connection refused"))), Verdict.BROKEN),
    "no-answer": (FakeServer(0, 4, info=raising(PeerTimeoutError("no answer within 1 s"))), Verdict.BROKEN),
    "not-a-server": (
        FakeServer(0, 4, info=raising(PeerUnreachableError("protocols not supported: [...]"))),
        Verdict.BROKEN,
    ),
    "info-refused": (FakeServer(0, 4, info=raising(REFUSED)), Verdict.BROKEN),
    "info-unreadable": (FakeServer(0, 4, info=raising(PeerAnswerError("its rpc_info cannot be read"))), Verdict.BROKEN),
    "dtype-mismatch": (FakeServer(0, 4, record={"torch_dtype": "torch.bfloat16"}), Verdict.DEGRADED),
    "version-mismatch": (FakeServer(0, 4, record={"version": "2.3.0"}), Verdict.DEGRADED),
    "hidden-size-mismatch": (FakeServer(0, 4, info=info_of(hidden_size=HIDDEN + 1)), Verdict.BROKEN),
    "info-ok-forward-fails": (FakeServer(0, 4, answer=raising(REFUSED)), Verdict.BROKEN),
    "not-finite": (
        FakeServer(0, 4, answer=raising(PeerNotFiniteError("3 of 9 values are not finite"))),
        Verdict.BROKEN,
    ),
    "wrong-shape": (
        FakeServer(0, 4, answer=raising(PeerAnswerError("expected a tensor of shape (1,)"))),
        Verdict.BROKEN,
    ),
    "wrong-answer": (FakeServer(0, 4, answer=raising(PeerAnswerError("expected float32, found int8"))), Verdict.BROKEN),
    "nondeterministic": (FakeServer(0, 4, answer=training), Verdict.BROKEN),
    "disagrees-with-replica": (FakeServer(0, 4, answer=noisy), Verdict.BROKEN),
    "opens-no-session": (
        FakeServer(0, 4, session=raising(PeerNoSessionError("it opens no session within 10 s"))),
        Verdict.DEGRADED,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_own_name_and_is_never_green(name: str) -> None:
    server, verdict = FAULTS[name]
    report = report_on(FakeSwarm(4, **good(), bad=server))
    assert findings(report) == findings(report, "bad") == {name}
    assert server_of(report, "bad").verdict is verdict
    assert server_of(report, "good").verdict is Verdict.HEALTHY
    assert report.verdict is Verdict.DEGRADED and report.exit_code == 1

    alone = report_on(FakeSwarm(4, bad=server))
    if name in ("disagrees-with-replica", "hidden-size-mismatch"):
        return  # it takes others to know
    assert alone.verdict is not Verdict.HEALTHY
    assert alone.models[0].verdict is (Verdict.BROKEN if name == "joining" else verdict)


def test_what_cannot_be_found_has_no_name() -> None:
    """Names are stable: each is given by a test here or in the tests of models below."""
    of_models = {"not-announced", "blocks-unknown", "missing-blocks", "thin-blocks", "malformed-records", "route-fails"}
    elsewhere = {"disagrees-with-home", "adapter-not-announced", "adapter-fails", "disputed", "probe-error"}
    assert set(FINDINGS) == set(FAULTS) | of_models | elsewhere


@pytest.mark.parametrize("words", ["routing: not found", "length greater than remaining number of bytes in buffer"])
def test_a_peer_that_cannot_be_there_is_a_record_without_a_server(words) -> None:
    """No address of it, or an identity that is none."""
    ghost = FakeServer(0, 4, info=raising(PeerUnreachableError(words)))
    assert findings(report_on(FakeSwarm(4, **good(), ghost=ghost)), "ghost") == {"record-without-server"}


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.full((1, 2, 3), torch.nan), "not-finite"),
        (torch.zeros(1, 2, 4), "wrong-shape"),
        (torch.zeros(1, 2, 3, dtype=torch.float16), "wrong-answer"),
    ],
)
def test_the_names_follow_what_reading_an_answer_really_raises(tensor: torch.Tensor, name: str) -> None:
    with pytest.raises(PeerAnswerError) as caught:
        wire.read_answer([wire.encode_tensor(tensor)], (1, 2, 3), torch.float32)
    found = from_forward_error(caught.value, "0:4")
    assert (found.name, found.level) == (name, Level.FORWARD)

"""What one server is asked, and how often. At the seam: no network."""

import pytest
import torch

from petals_eval.errors import (
    PeerCacheFullError,
    PeerNoSessionError,
    PeerRefusedError,
)
from petals_eval.health import Verdict
from petals_eval.health.locked import LockedServers
from petals_eval.swarm.peers.session_cache import CachePolicy
from tests.support.fake_health import (
    REFUSED,
    FakeServer,
    FakeSwarm,
    findings,
    good,
    info_of,
    raising,
    report_on,
    server_of,
)


def refusing(times: int):
    def session(number: int) -> None:
        if number <= times:
            raise PeerCacheFullError("Could not allocate 256 bytes immediately: out of memory")

    return session


@pytest.mark.parametrize(
    ("server", "asked", "found"),
    [
        (FakeServer(0, 4), 1, set()),
        (FakeServer(0, 4, session=refusing(2)), 3, set()),  # others asked at the same moment
        (FakeServer(0, 4, session=refusing(3)), 3, {"opens-no-session"}),
        (FakeServer(0, 4, session=raising(REFUSED)), 1, {"opens-no-session"}),
        # where nothing is known of its sessions, or there is no room, nothing is asked and nothing found
        (FakeServer(0, 4, session=refusing(9), info=info_of(cache_tokens_available=0)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(cache_tokens_available=None)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(session_tensors=10)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), info=info_of(session_tensors=None)), 0, set()),
        (FakeServer(0, 4, session=refusing(9), answer=raising(REFUSED)), 0, {"info-ok-forward-fails"}),
    ],
)
def test_whether_a_session_opens_is_asked_where_it_should(server, asked, found) -> None:
    swarm = FakeSwarm(4, one=server)
    report = report_on(swarm, in_virtual_time=True)
    assert findings(report, "one") == found
    assert swarm.sessions["one"] == asked and swarm.open_sessions == 0
    report_on(swarm, level="info")
    assert swarm.sessions["one"] == asked


def test_a_server_that_opens_no_session_says_what_it_said() -> None:
    report = report_on(FakeSwarm(4, one=FakeServer(0, 4, session=refusing(9))), in_virtual_time=True)
    (found,) = server_of(report, "one").findings
    assert "100 tokens of its cache are free" in found.detail and "out of memory" in found.detail
    assert server_of(report, "one").probes["forward"] == "passed", "it computes all the same"


def test_a_server_that_opened_no_session_is_not_asked_again_for_a_while() -> None:
    now = 0.0
    locked = LockedServers(lambda: now)
    swarm = FakeSwarm(4, one=FakeServer(0, 4, session=raising(PeerNoSessionError("its cache may be locked"))))
    for _ in range(5):
        assert findings(report_on(swarm, locked=locked)) == {"opens-no-session"}
    assert swarm.sessions["one"] == 1
    now = CachePolicy.locked_rest
    swarm.servers["one"] = FakeServer(0, 4)  # restarted
    for _ in range(2):
        assert findings(report_on(swarm, locked=locked)) == set()
    assert swarm.sessions["one"] == 3


def test_adapters_are_asked_for_and_tried() -> None:
    swarm = FakeSwarm(4, **good(), lora=FakeServer(0, 4, record={"adapters": ["me/lora"]}))
    assert findings(report_on(swarm)) == set() and "me/lora" in swarm.adapters
    report = report_on(swarm, active_adapter="me/lora")
    assert findings(report, "good") == {"adapter-not-announced"} and findings(report, "lora") == set()

    broken = FakeSwarm(4, **good(), lora=FakeServer(0, 4, record={"adapters": ["me/lora"]}))
    broken.refused_adapters = {"me/lora"}
    assert findings(report_on(broken)) == {"adapter-fails"}


def test_a_server_with_a_small_limit_is_asked_less_and_compared_all_the_same() -> None:
    def small(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] * hidden.shape[1] > 10:
            raise PeerRefusedError("Task size greater than max_batch_size (10)")
        return hidden

    report = report_on(FakeSwarm(4, **good(), small=FakeServer(0, 4, answer=small)))
    assert report.verdict is Verdict.HEALTHY and server_of(report, "small").compared == 4

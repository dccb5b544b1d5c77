"""Servers of two kinds in one swarm compute one model, and a session goes to those alone that have it as we do."""

import pytest
import torch

from petals_eval.errors import SwarmError
from petals_eval.health import Verdict, check_health
from tests.interop.conftest import BOUNDED
from tests.interop.petals_folders import block_states, make_petals_tiny
from tests.interop.real_petals import RealPetalsSwarm
from tests.interop.server_kinds import BLOOMBEE, DRIFT, PETALS_MAIN, chosen_kind
from tests.support.fake_health import findings
from tests.support.real_swarm import connect
from tests.support.wire_client import WireClient

BLOCKS, HIDDEN = 3, 32
TOGETHER = {PETALS_MAIN: (DRIFT, "llama"), BLOOMBEE: (DRIFT, "qwen3")}


def entering_and_leaving(folder, seq: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 320, (8, seq), generator=torch.Generator().manual_seed(7))
    entering, *_, leaving = block_states(folder, ids)
    return entering, leaving


def sessions_opened(swarm: RealPetalsSwarm) -> int:
    return sum(server.log().count("rpc_inference") for server in swarm.servers)


def test_a_session_is_opened_where_its_layout_is_ours_and_none_elsewhere(tmp_path):
    """rpc_info says how many tensors a step has. The version does not tell: all but 2.2.0 announce the same one."""
    kind = chosen_kind()
    folder = make_petals_tiny(kind.families[0], tmp_path / "tiny")
    entering, leaving = entering_and_leaving(folder)
    with RealPetalsSwarm(folder, [(0, BLOCKS)], dht_prefix="tiny") as swarm:
        (server,) = swarm.servers
        with WireClient(swarm.initial_peers) as client:
            schema = client.info(server.peer_id, "tiny.0")["inference_schema"]
            assert len(schema[0]) == kind.session_tensors
        with connect(swarm, request_timeout=30, deadline=10) as connection:
            blocks = connection.remote_sequential("tiny", BLOCKS)
            with blocks.inference_session(32, batch=8) as session:
                if kind.session_tensors == 3:
                    parts = [session.step(entering[:, :9]), session.step(entering[:, 9:])]
                    torch.testing.assert_close(torch.cat(parts, dim=1), leaving, rtol=1e-4, atol=1e-4)
                    assert sessions_opened(swarm) > 0
                else:
                    with pytest.raises(SwarmError, match=f"another layout \\({kind.session_tensors} tensors in a step"):
                        session.step(entering[:, :9])
                    assert sessions_opened(swarm) == 0
            torch.testing.assert_close(blocks(entering), leaving, rtol=1e-4, atol=1e-4)


if chosen_kind() in TOGETHER:  # Petals 2.2.0 is beside the stub in test_client_on_real_servers.py

    def test_two_kinds_in_one_swarm(tmp_path):
        """On overlapping spans, checked against each other: every route computes what Hugging Face does, nobody is
        accused, and their health is that of one swarm."""
        kind = chosen_kind()
        other, family = TOGETHER[kind]
        folder = make_petals_tiny(family, tmp_path / "tiny")
        entering, leaving = entering_and_leaving(folder)
        with (
            RealPetalsSwarm(folder, [(0, 2), (2, BLOCKS)], dht_prefix="tiny", kind=kind) as ours,
            RealPetalsSwarm(
                folder, [(0, BLOCKS)], dht_prefix="tiny", kind=other, initial_peers=ours.initial_peers
            ) as theirs,
        ):
            used = set()
            with connect(ours, verify=0.5, **BOUNDED) as connection:
                for _ in range(5):  # runs that have seen no server before
                    blocks = connection.remote_sequential("tiny", BLOCKS)
                    for part, expected in zip(entering.split(2), leaving.split(2), strict=True):
                        torch.testing.assert_close(blocks(part), expected, rtol=1e-4, atol=1e-4)
                    blocks.settle()
                    assert blocks.status().findings == ()
                    assert blocks.audit_progress().done > 0
                    used |= {peer.peer_id for peer in blocks.peers.values() if peer.bytes_received}
                assert used == {server.peer_id for swarm in (ours, theirs) for server in swarm.servers}
                with blocks.inference_session(32, batch=8) as session:
                    parts = [session.step(entering[:, :9]), session.step(entering[:, 9:])]
                    session.position = 5
                    again = session.step(entering[:, 5:])
                for found, expected in ((torch.cat(parts, dim=1), leaving), (again, leaving[:, 5:])):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                assert (sessions_opened(ours) > 0) <= (kind.session_tensors == 3)
            report = check_health(ours.initial_peers)
            assert (report.verdict, findings(report)) == (Verdict.HEALTHY, set())
            assert all(server.compared == server.end - server.start for server in report.models[0].servers)

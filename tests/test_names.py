"""One word for one thing: names that were replaced do not come back, and a limit is learned in one place."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = ("petals_eval", "tests", "scripts")

RETIRED = {
    "MODELS_KEY": "MODEL_INDEX_KEYS",
    # what is known of a server
    "PeerHistory": "Peer",
    "histories": "peers",
    "in_words": "error_text",
    "is_left_out": "is_quarantined",
    "Flow": "CongestionWindow",
    "begins": "mark_started",
    "came_back": "on_delivered",
    "slowed_down": "on_overtaken",
    "CacheBook": "SessionCache",
    "known_info": "Peer.info",
    # which server, and when
    "Line": "AdmissionQueues",
    "Lines": "AdmissionQueues",
    "news": "wait_for_capacity",
    "tell_news": "notify_capacity",
    "HopFinder": "Router",
    "find_or_wait": "Router.admit",
    "HopCalls": "HopClient",
    "has_room_for": "has_room",
    "PushCalls": "PushScheduler",
    "Way": "Delivery",
    "Flight": "MicroBatchStream",
    "cargo": "hidden_box",
    "_held_up": "_producer_paused",
    "_tell_of_room": "_resume_producer",
    "AHEAD": "StreamPolicy.max_queued_first",
    "MOST_WAITING": "StreamPolicy.max_queued_total",
    "MOST_MICRO_BATCHES": "StreamPolicy.max_micro_batches",
    "size_came_back": "MicroBatchSize.on_delivered",
    "session_too_large": "session_refusal",
    "Choice": "ServerFilter",
    # calls
    "BlockCalls": "Transport",
    "RemoteCalls": "Libp2pTransport",
    "WireBook": "negotiate",
    "code_for": "negotiate",
    "push_through": "push",
    "before_first_step": "Acceptance.ready",
    "as_peer_errors": "peer_errors",
    "_look_at": "retrieve_exception",
    "_look_at_error": "retrieve_exception",
    "MOST_WORDS": "MAX_ANSWER_OVERHEAD_BYTES",
    "MOST_INFO_BYTES": "MAX_INFO_BYTES",
    "LOSSY": "LOSSY_CODES",
    "_while_daemon_lives": "EventLoop._while_not_lost",
    "_BURIAL": "_SHUTDOWN_TIMEOUT",
    # whom to believe
    "CheckedCalls": "DeterminismGuard",
    "VerifiedCalls": "ReplicaAudit",
    "Checks": "AuditProgress",
    "_Standing": "ProbeState",
    "_covering": "_valid_probe",
    "_refuse_if_caught": "refuse_distrusted",
    "Judge": "Arbiter",
    "Claim": "RecordedCall",
    "Opinion": "ReplicaAnswer",
    "Sight": "Directory",
    "Distrust": "Quarantine",
    "distrust": "quarantine",
    "last_resort": "fallback_hop",
    "UnequalServer": "TrustFinding",
    "unequal_by": "TrustFinding",
    "on_distrusted": "Quarantine.add",
    "on_finding": "Quarantine.add_finding",
    "TOLERANCE": "SAME_SERVER",
    "Overflow": "raise_if_input_overflows",
    "ENOUGH_ANSWERS": "_ENOUGH_ANSWERS",
    "ENOUGH_SERVERS": "_ENOUGH_SERVERS",
    # runs
    "_Hope": "FailFast",
    "HOPELESS": "FailFast",
    "dwindles": "record_failure",
    "is_founded": "any_scored",
    "undisturbed": "deferred",
    "now_or_soon": "deliver",
    "unless_set": "environment_defaults",
    "explain_validation": "explain",
    "Answered": "RequestAnswer",
    "instead": "split_into_rows",
    "Bar": "Threshold",
    "SmallTables": "LookupTables",
    "disputed_keys": "Journal",
    "outlook": "estimate_run",
    # health, bench, stub
    "Looked": "ProbeRun",
    "Probed": "ServerProbe",
    "ProbeCalls": "Prober",
    "LiveCalls": "LiveNetwork",
    "Subject": "BenchTarget",
    "Nursery": "ForkServer",
    "Switchboard": "FaultInjector",
    "LoopThread": "EventLoop",
    # fakes of the swarm
    "FakeCalls": "FakeTransport",
}
"""Identifiers (classes, functions, attributes, constants) that are not used any more, and what is said now."""

RETIRED_MODULES = {
    "petals_eval.dry_run": "petals_eval.evaluation.dry_run",
    "petals_eval.evaluator": "petals_eval.evaluation.evaluate",
    "petals_eval.holding": "petals_eval.interrupts",
    "petals_eval.lossy_wire": "petals_eval.evaluation.wire_error",
    "petals_eval.merger": "petals_eval.evaluation.merge",
    "petals_eval.scoring": "petals_eval.evaluation.scoring",
    "petals_eval.bench.subject": "petals_eval.bench.target",
    "petals_eval.bench.watch": "petals_eval.bench.monitor",
    "petals_eval.cli.dry": "petals_eval.cli.dry_run",
    "petals_eval.cli.exits": "petals_eval.cli.exit_codes",
    "petals_eval.cli.listening": "petals_eval.cli.address_flags",
    "petals_eval.cli.opening": "petals_eval.cli.open_swarm",
    "petals_eval.data.problems": "petals_eval.validation",
    "petals_eval.health.home": "petals_eval.health.reference_blocks",
    "petals_eval.health.outlook": "petals_eval.evaluation.estimate",
    "petals_eval.local_swarm.announce": "petals_eval.local_swarm.server.announce",
    "petals_eval.local_swarm.cache": "petals_eval.local_swarm.server.cache_budget",
    "petals_eval.local_swarm.compute": "petals_eval.local_swarm.server.compute",
    "petals_eval.local_swarm.faulty": "petals_eval.local_swarm.faults.injector",
    "petals_eval.local_swarm.handler": "petals_eval.local_swarm.server.handler",
    "petals_eval.local_swarm.kv_cache": "petals_eval.local_swarm.server.kv_cache",
    "petals_eval.local_swarm.loop_thread": "petals_eval.swarm.event_loop",
    "petals_eval.local_swarm.messages": "petals_eval.local_swarm.server.messages",
    "petals_eval.local_swarm.nursery": "petals_eval.local_swarm.fork_server",
    "petals_eval.local_swarm.process": "petals_eval.local_swarm.server.main",
    "petals_eval.local_swarm.servers": "petals_eval.local_swarm.handles",
    "petals_eval.local_swarm.sessions": "petals_eval.local_swarm.server.sessions",
    "petals_eval.local_swarm.settings": "petals_eval.local_swarm.server.settings",
    "petals_eval.model.norms": "petals_eval.model.local",
    "petals_eval.report.text": "petals_eval.text",
    "petals_eval.runs.bars": "petals_eval.runs.thresholds",
    "petals_eval.runs.code": "petals_eval.runs.code_hash",
    "petals_eval.runs.copying": "petals_eval.runs.copy_rows",
    "petals_eval.runs.disputed": "petals_eval.runs.journal",
    "petals_eval.runs.small_tables": "petals_eval.runs.lookup_tables",
    "petals_eval.swarm.admission": "petals_eval.swarm.scheduling.admission",
    "petals_eval.swarm.cache_book": "petals_eval.swarm.peers.session_cache",
    "petals_eval.swarm.calls": "petals_eval.swarm.transport.libp2p",
    "petals_eval.swarm.checked_calls": "petals_eval.swarm.trust.determinism_guard",
    "petals_eval.swarm.codecs": "petals_eval.swarm.wire.codecs",
    "petals_eval.swarm.daemon": "petals_eval.swarm.transport.daemon",
    "petals_eval.swarm.determinism": "petals_eval.swarm.trust.determinism",
    "petals_eval.swarm.distrust": "petals_eval.swarm.trust.quarantine",
    "petals_eval.swarm.flight": "petals_eval.swarm.stream",
    "petals_eval.swarm.flow": "petals_eval.swarm.peers.window",
    "petals_eval.swarm.gradients": "petals_eval.swarm.activations",
    "petals_eval.swarm.hop_calls": "petals_eval.swarm.transport.client",
    "petals_eval.swarm.hop_finder": "petals_eval.swarm.scheduling.router",
    "petals_eval.swarm.hop_session": "petals_eval.swarm.transport.hop_session",
    "petals_eval.swarm.inference_session": "petals_eval.swarm.sessions.inference_session",
    "petals_eval.swarm.limits": "petals_eval.swarm.peers.limits",
    "petals_eval.swarm.lines": "petals_eval.swarm.scheduling.admission",
    "petals_eval.swarm.missing": "petals_eval.swarm.scheduling.waiting",
    "petals_eval.swarm.opening": "petals_eval.swarm.transport.opening",
    "petals_eval.swarm.overflow": "petals_eval.swarm.trust.non_finite",
    "petals_eval.swarm.push_calls": "petals_eval.swarm.scheduling.push_scheduler",
    "petals_eval.swarm.push_choice": "petals_eval.swarm.scheduling.push_choice",
    "petals_eval.swarm.pushing": "petals_eval.swarm.transport.push",
    "petals_eval.swarm.records": "petals_eval.swarm.wire.records",
    "petals_eval.swarm.routing": "petals_eval.swarm.directory.routing",
    "petals_eval.swarm.rpc": "petals_eval.swarm.transport.rpc",
    "petals_eval.swarm.sizes": "petals_eval.swarm.scheduling.tuning",
    "petals_eval.swarm.unequal": "petals_eval.swarm.trust.finding_text",
    "petals_eval.swarm.untrusted": "petals_eval.swarm.wire.msgpack_reader",
    "petals_eval.swarm.verify": "petals_eval.swarm.trust",
    "petals_eval.swarm.wire_book": "petals_eval.swarm.transport.codec_negotiation",
    "tests.swarm.fakes": "tests.support.fake_swarm",
    "tests.swarm.verifying": "tests.support.audited_run",
}
"""Modules that moved, and where to."""


def sources():
    """Every Python file of the project, with its text."""
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def identifiers(source):
    return {
        token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.NAME
    }


def test_retired_identifiers_are_used_nowhere():
    used = {f"{path}: {name}" for path, source in sources() for name in identifiers(source) & RETIRED.keys()}
    assert used == set()


def test_what_is_said_now_is_said():
    used = set().union(*(identifiers(source) for path, source in sources() if path.startswith("petals_eval/")))
    assert {new for new in RETIRED.values() if new.rpartition(".")[2] not in used} - {"FakeTransport"} == set()


def test_retired_modules_are_named_nowhere():
    retired = re.compile(rf"\b(?:{'|'.join(map(re.escape, RETIRED_MODULES))})\b")
    names = {
        f"{path}: {found}"
        for path, source in sources()
        if path != "tests/test_names.py"
        for found in retired.findall(source)
    }
    assert names == set()


@pytest.mark.parametrize("module", RETIRED_MODULES)
def test_a_module_that_moved_is_gone_and_is_where_it_is_said_to_be(module):
    def is_there(name):
        path = ROOT.joinpath(*name.split("."))
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()

    assert not is_there(module)
    assert is_there(RETIRED_MODULES[module])


def test_a_limit_is_learned_in_one_file():
    learning = {
        path
        for path, source in sources()
        if path.startswith("petals_eval/")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("learn_per_call", "learn_per_session")
    }
    assert learning == {"petals_eval/swarm/transport/client.py"}

"""Words of peers and of files, meant for whoever reads: a terminal, a log, Markdown, a page. They stay words."""

import asyncio
import logging

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.serializer import MSGPackSerializer
from safetensors.torch import save_file

from petals_eval.cli.exit_codes import run_command
from petals_eval.errors import AdapterError, DeadlineError, PeerError
from petals_eval.swarm.peers.finding import TrustFinding
from petals_eval.swarm.peers.peer_text import error_text
from petals_eval.swarm.transport.raw_stream import receive
from petals_eval.swarm.transport.rpc import peer_errors
from petals_eval.swarm.trust.finding_text import stop_text, warning_text
from petals_eval.swarm.wire import messages
from petals_eval.swarm.wire.records import Announcement, ServerRecord, SpanServer, read_snapshot
from petals_eval.swarm.wire.server_info import read_info
from petals_eval.swarm.wire.span import Span
from petals_eval.text import printable
from tests.hostile.from_files import TARGETS, _adapter
from tests.support.fake_swarm import FakeDirectory, FakeTransport, pipeline, run
from tests.support.rpc_info import info

EVIL = (
    "\x1b[31mred\x1b]0;title\x07\r\nerror: forged\u202egnp\u2028\x85# head <b>x</b> [bold]b[/bold] | `c` \u200b\x9b2J"
)
MOVES = {"\x1b", "\x07", "\r", "\x85", "\u202e", "\u2028", "\u200b", "\x9b"}


def is_one_line_of_words(text: str) -> bool:
    return text.isprintable()


RECORD = ServerRecord.from_wire(
    (2, 1.0, {"version": EVIL, "public_name": EVIL, "torch_dtype": EVIL, "quant_type": EVIL, "start_block": 0})
)
SERVER = SpanServer("12D3KooWEvil", Span(0, 4), RECORD)


@pytest.mark.parametrize("status", ["nondeterministic", "wrong", "disputed"])
def test_notices_and_the_reason_to_stop(status, caplog):
    caught = TrustFinding(SERVER, status, Span(0, 4), 0.5, others=("12D3KooWOther",))
    notice = warning_text(caught, 1, {"hidden_dropout": 0.1})
    assert is_one_line_of_words(notice)
    for line in stop_text("0:4", [caught], {}).split("\n"):
        assert is_one_line_of_words(line) and not line.startswith("error")
    with caplog.at_level(logging.WARNING, "petals_eval"):
        logging.getLogger("petals_eval").warning(notice)
    assert len(caplog.text.splitlines()) == 1


@pytest.mark.parametrize("kind", [P2PHandlerError, P2PDaemonError, ValueError, OSError])
def test_what_a_peer_says_of_its_error(kind):
    with pytest.raises(PeerError) as caught, peer_errors(1):
        raise kind(EVIL)
    assert is_one_line_of_words(str(caught.value)) and is_one_line_of_words(error_text(caught.value))


def test_an_error_in_a_stream():
    async def read():
        content = RPCError(message=EVIL).SerializeToString()
        reader = asyncio.StreamReader()
        reader.feed_data(b"\1" + len(content).to_bytes(8, "big") + content)
        await receive(reader, runtime_pb2.ExpertResponse, 4096)

    with pytest.raises(PeerError) as caught:
        asyncio.run(read())
    assert is_one_line_of_words(str(caught.value))


def test_why_a_run_ends_at_its_deadline():
    transport = FakeTransport()

    def refuse(hop, hidden):
        with peer_errors(1):
            raise P2PHandlerError(EVIL)

    transport.on_call = refuse
    with pytest.raises(DeadlineError) as caught:
        run(pipeline(FakeDirectory(4, SERVER), transport), torch.zeros(1, 2, 4))
    assert is_one_line_of_words(str(caught.value)) and "error: forged" in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        runtime_pb2.Tensor(size=(2, 3), dtype=EVIL, buffer=b""),
        runtime_pb2.Tensor(size=(2, 3), dtype="float32", compression=5, buffer=b""),
        runtime_pb2.Tensor(size=(2**32 - 1,) * 1000, dtype="float32", buffer=b""),
    ],
)
def test_a_tensor_that_is_refused(message):
    with pytest.raises(PeerError) as caught:
        messages.read_answer([message], (2, 3), torch.float32)
    assert is_one_line_of_words(str(caught.value)) and len(str(caught.value)) <= 200


def test_what_a_server_says_of_itself():
    assert is_one_line_of_words(read_info(info(version=EVIL)).version or "")
    for changes in ({"forward_schema": EVIL}, {"outputs_schema": (EVIL,)}):
        with pytest.raises(PeerError) as caught:
            read_info(info(**changes))
        assert is_one_line_of_words(str(caught.value))
    with pytest.raises(PeerError) as caught:
        read_info(MSGPackSerializer.dumps({EVIL: EVIL}))
    assert is_one_line_of_words(str(caught.value))


def test_a_record():
    said = (RECORD.version, RECORD.public_name, RECORD.torch_dtype, RECORD.quant_type)
    assert all(word and is_one_line_of_words(word) and len(word) <= 80 for word in said)
    snapshot = read_snapshot([Announcement(0, "a", (2, 1.0, {"version": 1, EVIL: EVIL}), 1.0)], 4)
    assert (snapshot.servers, snapshot.dropped) == ({}, 1)


def test_an_error_of_a_command_cannot_move_the_cursor(capsys):
    def fail():
        raise DeadlineError(f"stopped\n  {EVIL}")

    assert run_command(fail) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: stopped\n  ") and not MOVES & set(said)

    def bug():
        raise KeyError(EVIL)

    assert run_command(bug) == 70
    assert not MOVES & set(capsys.readouterr().err)


def test_names_in_a_file(tmp_path):
    save_file({EVIL: torch.ones(2)}, tmp_path / "evil.safetensors")
    with pytest.raises(AdapterError) as caught:
        _adapter(tmp_path / "evil.safetensors")
    assert not MOVES & set(str(caught.value))
    assert not any(line.startswith("error: forged") for line in str(caught.value).splitlines())
    TARGETS["peft config"].run(b'{"peft_type": "\\u001b[31m"}')


def test_printable_leaves_nothing_that_moves():
    assert not MOVES & set(printable(EVIL))
    assert "\n" not in printable(EVIL)

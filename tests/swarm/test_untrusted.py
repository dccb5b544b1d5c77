"""What strangers send as msgpack: it is read within bounds, or refused, and the process lives."""

import subprocess
import sys
import time

import msgpack
import pytest
import torch
from hivemind.utils.serializer import MSGPackSerializer

from petals_eval.errors import PeerAnswerError
from petals_eval.swarm.wire import messages as wire
from petals_eval.swarm.wire import msgpack_reader as untrusted
from tests.swarm.test_wire import info


def nested(depth: int, code: int = 0x40) -> bytes:
    """A tuple within a tuple, and so on: a few bytes each."""
    content = msgpack.packb([])
    for _ in range(depth):
        content = msgpack.packb([msgpack.ExtType(code, content)])
    return content


@pytest.mark.parametrize("depth", [untrusted.DEEPEST + 1, 300, 5000])
def test_messages_that_nest_too_deep_are_refused(depth):
    """At 300 hivemind's own decoder ends the process (signal 11)."""
    with pytest.raises(PeerAnswerError, match="messages within messages"):
        wire.read_info(nested(depth) if depth < 5000 else nested(depth)[: wire.MOST_INFO_BYTES])


def test_values_of_the_dht_that_nest_too_deep_are_refused_by_hivemind_itself():
    """In a process of its own, for it would end this one."""
    script = (
        "from petals_eval.swarm.wire.msgpack_reader import bound_hivemind\n"
        "from hivemind.dht.node import DHTNode\n"
        "from hivemind.utils.serializer import MSGPackSerializer\n"
        "from tests.swarm.test_untrusted import nested\n"
        "bound_hivemind(); bound_hivemind()\n"
        "for code in (0x40, 0x50, 0x51):\n"
        "    for depth in (300, 3000):\n"
        "        try:\n"
        "            MSGPackSerializer.loads(nested(depth, code))\n"
        "        except (ValueError, TypeError, KeyError):\n"
        "            print('refused')\n"
        "print(MSGPackSerializer.loads(MSGPackSerializer.dumps((2, 1.0, {'a': (1, (2,))}))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert done.stdout.split("\n")[-2] == "(2, 1.0, {'a': (1, (2,))})"
    assert done.stdout.count("refused") == 4 + 2


def test_what_hivemind_writes_is_read():
    value = {"a": (1, [2, (3,)]), "b": "text", "c": b"bytes", "d": None}
    assert untrusted.loads(MSGPackSerializer.dumps(value)) == value


def test_no_name_of_a_stranger_imports_anything():
    """hivemind asks torch for it, and torch imports what is called so: "_inductor" takes seconds."""
    serialized = info().replace(b"torch.bfloat16", b"torch._inductor"[:14])
    assert serialized != info()
    started = time.monotonic()
    with pytest.raises(PeerAnswerError, match=r"names dtypes torch\._inducto and torch\._inducto"):
        wire.read_info(serialized)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(("name", "dtype"), [("torch.float32", torch.float32), ("torch.float16", torch.float16)])
def test_dtypes_are_read_by_name(name, dtype):
    described = MSGPackSerializer.dumps({"dtype": name, "size": [None, 1, 64], "layout": 5})
    descriptor = msgpack.ExtType(0x51, described)
    packed = msgpack.packb(
        {"forward_schema": [[descriptor], {}], "outputs_schema": [descriptor], "version": "\x1b[31m" + "9" * 9000}
    )
    read = wire.read_info(packed)
    assert (read.input_dtype, read.output_dtype, read.hidden_size) == (dtype, dtype, 64)
    assert read.version == "\ufffd[31m" + "9" * 74 + "…"


def test_an_info_beyond_any_use_is_not_decoded():
    with pytest.raises(PeerAnswerError, match="at most 65536 bytes, found 4194304"):
        wire.read_info(b"\xc0" * (4 << 20))

"""What the stub takes from the client: framing facts, and nothing that decodes or checks what a peer sent."""

import ast
from pathlib import Path

import petals_eval.local_swarm

SHARED = {
    "MODEL_INDEX_KEYS", "SESSION_TENSORS", "ServerRecord", "ServerState", "Span", "TransformerConnectionHandler",
    "block_uid", "chain_uid", "codecs", "dtype_name", "encode_tensor", "end_daemon", "start_daemon",
}  # fmt: skip
"""What both sides must spell alike, how a daemon is started and ended, and the codecs (README.md of the stub)."""


def test_the_stub_shares_framing_facts_with_the_client_and_no_reader():
    folder = Path(petals_eval.local_swarm.__file__).parent
    taken = {
        alias.name
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("petals_eval.swarm")
        for alias in node.names
    }
    assert taken == SHARED

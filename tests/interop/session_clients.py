"""Clients with sessions on a swarm, to be killed: one for each line on stdin, as a process whose id is written out.

Reads JSON settings from its first argument: initial_peers, dht_prefix, blocks, hidden. Everything is imported before
the first fork, so that a client is up in a fraction of a second. A client opens one session after the other in two
threads, rows in steps and an inference session, until it is killed.
"""

import json
import os
import sys
import threading

import torch

from petals_eval.config import SwarmSettings
from petals_eval.swarm import SwarmConnection
from petals_eval.swarm import remote_sequential as _  # noqa: F401 - imported before the forks


def main() -> None:
    settings = json.loads(sys.argv[1])
    for _line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            client(settings)
        print(pid, flush=True)
        os.waitpid(pid, 0)


def client(settings: dict) -> None:
    chosen = SwarmSettings(initial_peers=tuple(settings["initial_peers"]), max_tokens_per_call=8)
    connection = SwarmConnection.connect(chosen)
    blocks = connection.remote_sequential(settings["dht_prefix"], settings["blocks"])
    hidden = torch.zeros(1, 60, settings["hidden"])

    def rows_in_steps() -> None:
        while True:
            blocks(hidden)

    threading.Thread(target=rows_in_steps, daemon=True).start()
    while True:
        with blocks.inference_session(100) as session:
            for _step in range(10):
                session.step(hidden[:, :8])
            session.position = 20
            session.step(hidden[:, :1])


if __name__ == "__main__":
    main()

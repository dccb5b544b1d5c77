"""How many tokens a second texts grow at, one at a time and several at once, over servers behind a delay.

    python scripts/bench_generation.py $PETALS_EVAL_REALDATA/stories260K-hf --rows 1 8 --by-calls

The ways take turns, so that a busy machine is as busy for each of them.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from petals_eval import RemoteModel
from petals_eval.local_swarm import LocalSwarm
from petals_eval.local_swarm.faults.catalog import OtherLayout
from petals_eval.local_swarm.network import EmulatedNetwork, LinkProfile
from petals_eval.tasks.requests import Decoding, Request

TEXT = "Once upon a time there was a little girl named Lily. She loved to play outside in the"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds one way before each server")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="texts at once")
    parser.add_argument("--texts", type=int, default=16, help="in each measurement")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by-calls", action="store_true", help="also where no server opens a session")
    arguments = parser.parse_args()
    ways = [
        (rows, by_calls) for by_calls in ([False, True] if arguments.by_calls else [False]) for rows in arguments.rows
    ]
    rates: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    with swarm_of(arguments) as swarm:
        for _ in range(arguments.rounds):
            for rows, by_calls in ways:
                for server in swarm.servers:
                    server.switch(*([OtherLayout()] if by_calls else []))
                rates[rows, by_calls].append(tokens_per_second(swarm, rows, arguments))
    for (rows, by_calls), found in rates.items():
        way = "by forward calls" if by_calls else "in sessions"
        print(f"{rows} at once {way}: {statistics.median(found):.1f} tokens/s ({min(found):.1f} to {max(found):.1f})")


@contextmanager
def swarm_of(arguments: argparse.Namespace) -> Iterator[LocalSwarm]:
    link = LinkProfile(delay=arguments.delay)
    with (
        EmulatedNetwork() as network,
        LocalSwarm(arguments.model, servers=arguments.servers, network=network, links=link) as swarm,
    ):
        yield swarm


def tokens_per_second(swarm: LocalSwarm, rows: int, arguments: argparse.Namespace) -> float:
    peers, prefix = swarm.initial_peers, swarm.dht_prefix
    with RemoteModel.from_pretrained(
        swarm.model, initial_peers=peers, dht_prefix=prefix, generation_rows=rows
    ) as model:
        ids = tuple(model.local.tokenizer(TEXT)["input_ids"])

        def requests(count: int, new_tokens: int) -> list[Request]:
            return [Request(str(index), 0, ids, decoding=Decoding(new_tokens)) for index in range(count)]

        list(model.generate(requests(1, 2)))  # every server has been asked what is asked once
        started = time.perf_counter()
        tokens = sum(
            len(each.answer.token_ids) for each in model.generate(requests(arguments.texts, arguments.new_tokens))
        )
        return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

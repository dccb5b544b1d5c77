"""Arithmetic that is a wait, in virtual time: how long it waits, and what it answers."""

import asyncio
from dataclasses import replace

import pytest
import torch

from petals_eval.local_swarm.server.kv_cache import SessionCache
from petals_eval.local_swarm.server.paced_span import PacedSpan
from petals_eval.local_swarm.server.settings import ServerSettings
from petals_eval.local_swarm.work import Work
from petals_eval.simulator.virtual_time import run_in_virtual_time
from petals_eval.swarm.wire.span import Span

SETTINGS = ServerSettings(
    model="m", dht_prefix="m", start=0, stop=4, pace=1000, call_seconds=0.5, max_batch_size=64, throughput=1.0
)


def work(batch: int, seq: int, span: Span = SETTINGS.span, cache: SessionCache | None = None) -> Work:
    return Work("forward", span, torch.zeros(batch, seq, 2), None, "", "somebody", cache)


def answers(*asked: Work, at_once: bool = False) -> tuple[list[torch.Tensor], float]:
    async def ask(runtime):
        span = PacedSpan(SETTINGS)
        if at_once:
            return await asyncio.gather(*map(span, asked))
        return [await span(each) for each in asked]

    return run_in_virtual_time(ask)


def test_it_takes_a_call_and_its_tokens_one_after_the_other():
    assert answers(work(2, 10))[1] == pytest.approx(0.5 + 0.02)
    assert answers(work(2, 10), work(1, 30), at_once=True)[1] == pytest.approx(1.05)


def test_a_part_of_its_blocks_takes_a_part_of_the_time():
    assert answers(work(2, 10, Span(1, 2)))[1] == pytest.approx(0.5 + 0.005)


def test_parts_of_the_blocks_come_to_what_the_whole_does():
    (whole,), _ = answers(work(1, 5))
    (first,), _ = answers(work(1, 5, Span(0, 3)))
    (rest,), _ = answers(replace(work(1, 5, Span(3, 4)), hidden=first))
    assert torch.equal(whole, rest) and len(whole[0, :, 0].unique()) == 5


def test_a_session_goes_on_where_it_was():
    cache = SessionCache(4, 8)
    (whole, first, rest), _ = answers(work(1, 5), work(1, 3, cache=cache), work(1, 2, cache=cache))
    assert torch.equal(whole, torch.cat([first, rest], dim=1)) and cache.length == 5


def test_what_is_larger_than_a_call_may_be_is_refused_in_the_words_of_petals():
    with pytest.raises(ValueError, match="Task size greater than max_batch_size"):
        answers(work(5, 13))

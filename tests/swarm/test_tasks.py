"""Tasks of the event loop, several together."""

import asyncio

import pytest

from petals_eval.errors import PeerRefusedError
from petals_eval.swarm.tasks import together


def test_a_timeout_around_calls_of_which_one_failed_is_still_a_timeout():
    async def refused():
        raise PeerRefusedError("no")

    async def hang():
        await asyncio.sleep(60)

    async def run():
        async with asyncio.timeout(0.05):
            with pytest.raises(PeerRefusedError):
                await together([hang(), refused(), refused()])
            assert asyncio.all_tasks() == {asyncio.current_task()}
            await hang()

    with pytest.raises(TimeoutError):
        asyncio.run(run())

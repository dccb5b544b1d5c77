"""A link of the emulated network by itself."""

import pytest

from petals_eval.local_swarm.relays import Link


def test_a_link_is_a_serial_line():
    link = Link(rate=1000.0)
    ends = [link.send(100, now=0.0) for _ in range(10)]
    assert ends == pytest.approx([0.1 * count for count in range(1, 11)])
    assert (link.bytes, link.busy) == (1000, pytest.approx(1.0))
    free = Link(rate=None)
    assert (free.send(10**9, now=3.0), free.busy) == (3.0, 0.0)

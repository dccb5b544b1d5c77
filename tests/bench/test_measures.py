"""What benchmarks are reckoned with: spreads, floors and the cost of processes."""

import os
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest

from petals_eval.bench import floor, processes, statistics
from petals_eval.bench.plot import line_plot
from petals_eval.local_swarm.network import LinkProfile, LinkUse


def test_percentiles_lie_between_the_values():
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [statistics.percentile(values, percent) for percent in (0, 25, 50, 90, 100)] == [1, 2, 3, 4.6, 5]
    with pytest.raises(ValueError, match="at least one"):
        statistics.percentile([], 50)


def test_the_busiest_direction_of_any_link_counts():
    uses = [LinkUse(10, 20, 0.1, 0.2), LinkUse(30, 1, 0.3, 0.0)]
    assert floor.link_seconds(uses) == 0.3
    assert floor.link_seconds([]) == 0.0
    assert floor.pass_seconds([LinkProfile(delay=0.02), LinkProfile(delay=0.01)]) == pytest.approx(0.06)


def test_processor_time_of_a_process_and_its_child():
    program = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, busy])
    try:
        deadline = time.monotonic() + 30
        while processes.processor_seconds(processes.tree(process.pid)) < 0.3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(processes.tree(process.pid)) == 2
        assert processes.memory(processes.tree(process.pid)) > 2**20
    finally:
        for pid in reversed(processes.tree(process.pid)):
            os.kill(pid, 9)
        process.wait()
    assert processes.tree(process.pid) == []
    assert processes.processor_seconds([process.pid]) == 0.0


def test_a_plot_is_well_formed_and_shows_every_point():
    lines = {"a < b": [(16.0, 1.5), (512.0, 27.0)], "other": [(16.0, 0.0)]}
    picture = ElementTree.fromstring(line_plot("rate & time", "tokens", "seconds", lines))
    tags = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert (tags.count("polyline"), tags.count("circle")) == (2, 3)
    texts = [element.text for element in picture.iter() if element.text]
    assert {"a < b", "rate & time", "600", "30"} <= set(texts)
    circles = [element for element in picture.iter() if element.tag.endswith("circle")]
    assert all(70 <= float(circle.get("cx")) <= 590 and 40 <= float(circle.get("cy")) <= 340 for circle in circles)
    with pytest.raises(ValueError, match="at least one"):
        line_plot("nothing", "x", "y", {})

"""Uptime from the looks of the last days."""

from dataclasses import replace
from pathlib import Path

import pytest

from petals_eval.errors import MachineError
from petals_eval.health import Verdict
from petals_eval.health.history import DAY, History
from tests.support.fake_health import broken_report, clean_report


def test_uptime_survives_a_restart_and_forgets_after_a_day(tmp_path: Path) -> None:
    file = tmp_path / "health.sqlite"
    now = 10 * DAY
    past = History(file)
    past.add(replace(broken_report(), time=now - 2 * DAY))
    past.add(replace(broken_report(), time=now - 0.9 * DAY))
    past.add(replace(clean_report(), time=now - 60))
    past.add_failure(now - 30)
    past.close()
    again = History(file)
    uptime = again.uptime("tiny", 4, now)
    assert uptime.blocks == (1.0, 1.0, 0.5, 0.5) and uptime.looks == 3
    assert uptime.slots[-1] is Verdict.UNKNOWN and uptime.slots[4] is Verdict.BROKEN and uptime.slots[20] is None
    again.add(replace(clean_report(), time=now + 20 * DAY))
    assert again.uptime("tiny", 4, now).looks == 0
    again.close()


def test_a_history_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database " * 200)
    with pytest.raises(MachineError, match="--history"):
        History(tmp_path / "file")

"""`--verbose` and PETALS_EVAL_LOG: debug events on stderr, and nothing of them otherwise."""

import logging
import re

import pytest

from tests.cli.invoking import invoke

EVENT = r"\d\d:\d\d:\d\d\.\d{3} petals_eval\.swarm\.routes: block 3 next, by a\ufffd\[31m peer\n"


@pytest.fixture(autouse=True)
def one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `tasks` thinks, once, and names a peer that would like to colour the terminal."""

    def no_tasks() -> list[object]:
        logging.getLogger("petals_eval.swarm.routes").debug("block %d next, by %s", 3, "a\x1b[31m peer")
        return []

    monkeypatch.setattr("petals_eval.tasks.list_tasks", no_tasks)
    monkeypatch.delenv("PETALS_EVAL_LOG", raising=False)


def test_the_flag_shows_events_with_their_time() -> None:
    outcome = invoke("tasks", "--verbose")
    assert outcome.code == 0
    assert re.fullmatch(EVENT, outcome.err)
    assert "block 3" not in outcome.out


@pytest.mark.parametrize(("value", "is_shown"), [("1", True), ("debug", True), ("0", False), ("", False)])
def test_so_does_the_variable(monkeypatch: pytest.MonkeyPatch, value: str, is_shown: bool) -> None:
    monkeypatch.setenv("PETALS_EVAL_LOG", value)
    assert bool(re.fullmatch(EVENT, invoke("tasks").err)) is is_shown


def test_without_them_nothing_is_shown_also_after_a_command_with_them() -> None:
    logger = logging.getLogger("petals_eval")
    before = logger.level, list(logger.handlers)
    invoke("tasks", "--verbose")
    assert (logger.level, list(logger.handlers)) == before
    assert invoke("tasks").err == ""


@pytest.mark.parametrize("command", ["run", "demo", "swarm", "bootstrap", "merge", "health", "bench inference"])
def test_every_command_has_the_flag(command: str) -> None:
    assert "--verbose" in invoke(*command.split(), "--help").out

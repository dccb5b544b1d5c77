"""The command itself: help that can be read, the version, the tasks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import petals_eval
from petals_eval.cli import main
from petals_eval.metrics import KINDS
from petals_eval.tasks import list_tasks, load_task
from tests.cli.invoking import invoke

COMMANDS = ("run", "demo", "swarm", "bootstrap", "show", "compare", "errors", "tasks")


@pytest.mark.parametrize("width", [80, 110])
def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ([], *([name] for name in COMMANDS)):
        outcome = invoke(*command, "--help")
        assert outcome.code == 0
        assert outcome.err == ""
        assert max(map(len, outcome.out.splitlines())) <= width
    shown = invoke("--help").out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "...\n" not in shown.partition("Commands:")[2]  # no description is cut


def test_help_shows_examples_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("run", "--help").out
    assert "    petals-eval run --model bigscience/bloom --adapter ./sst2-prompts \\\n" in shown
    headings = ["Model:", "Task and data:", "Swarm:", "Servers and calls:", "Output:", "Options:"]
    assert [line for line in shown.splitlines() if line in headings] == headings
    assert "<str>" not in shown and "list[" not in shown
    assert "    petals-eval swarm ./my-llama --span 0:4 --span 3:6\n" in invoke("swarm", "-h").out


def test_help_and_version_import_nothing_heavy() -> None:
    """They answer at once: seconds of imports are for commands that need them."""
    heavy = ["torch", "transformers", "datasets", "sklearn", "hivemind", "numpy"]
    script = f"""if True:
        import sys
        from petals_eval.cli import main
        for arguments in (["--help"], ["run", "--help"], ["--version"]):
            try:
                main(arguments)
            except SystemExit as stop:
                assert stop.code == 0
        print([name for name in {heavy!r} if name in sys.modules])
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert ended.stderr == ""


def test_without_a_command_the_help_is_shown() -> None:
    outcome = invoke()
    assert outcome.code == 2
    assert "Usage: petals-eval [OPTIONS] COMMAND" in outcome.err


def test_an_unknown_command() -> None:
    outcome = invoke("evaluate")
    assert outcome.code == 2
    assert "No such command 'evaluate'" in outcome.err


def test_the_version() -> None:
    outcome = invoke("--version")
    assert (outcome.code, outcome.out) == (0, f"petals-eval {petals_eval.__version__}\n")


def test_the_tasks_that_ship_by_kind() -> None:
    outcome = invoke("tasks")
    assert outcome.code == 0
    kind = ""
    shown = []
    for line in outcome.out.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            kind = heading[1]
        elif entry := re.fullmatch(r"  (\w+) +(\S.*)", line):
            shown.append((kind, entry[1], entry[2]))
    shipped = list_tasks()
    assert {(task.kind, task.name, task.description) for task in shipped} <= set(shown)
    assert len(dict.fromkeys(kind for kind, _, _ in shown)) == len({task.kind for task in shipped}) == 5
    assert "data nyu-mll/glue sst2 validation\n" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_a_shipped_task_as_the_file_that_it_is(tmp_path: Path) -> None:
    for task in list_tasks():
        outcome = invoke("tasks", task.name)
        assert (outcome.code, outcome.err) == (0, "")
        (tmp_path / f"{task.name}.yaml").write_text(outcome.out, encoding="utf-8")
        read = load_task(tmp_path / f"{task.name}.yaml")
        assert isinstance(read, type(task)) and read.model_dump() == task.model_dump()
    outcome = invoke("tasks", "hellaswg")
    assert outcome.code == 2
    assert "there is no shipped task hellaswg. Did you mean hellaswag?" in outcome.error


def test_the_metrics_of_each_kind() -> None:
    outcome = invoke("tasks", "--metrics")
    assert outcome.code == 0
    for kind, specs in KINDS.items():
        alone = invoke("tasks", "--metrics", kind).out
        assert alone.startswith(f"{kind}:\n") and alone in outcome.out
        lines = [line.split(maxsplit=1) for line in alone.splitlines()[1:]]
        assert lines == [[spec.name, spec.about] for spec in specs]
    unknown = invoke("tasks", "--metrics", "chioce")
    assert unknown.code == 2 and "Expected a kind of task: one of " in unknown.error


def test_a_command_called_from_python_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started later (a Petals server, say) must not inherit the silence that commands keep."""
    monkeypatch.delenv("HIVEMIND_LOGLEVEL", raising=False)
    before = dict(os.environ)
    with pytest.raises(SystemExit):
        main(["tasks"])
    assert dict(os.environ) == before

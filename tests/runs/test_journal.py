"""The journal: one valid row a key, nothing committed is lost, and who is to blame when the disk cannot."""

import itertools
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from petals_eval.errors import DataError, MachineError, RunFolderError
from petals_eval.interrupts import deliver
from petals_eval.runs import Counts, Journal, ServerUsed
from petals_eval.runs import journal as journal_module
from petals_eval.runs.lookup_tables import LookupTables
from petals_eval.runs.rows import Row
from petals_eval.tasks.requests import Prediction
from tests.runs.samples import SERVERS, prediction, reachable_folder, unprivileged


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def rows(path: Path, sql: str) -> list[tuple]:
    """As another program reads it."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_what_goes_in_comes_back_in_source_order(path: Path) -> None:
    order = [10, 2, 33, 0, 1]
    with Journal(path, create=True) as journal:
        for key in order:
            journal.add("a", prediction(key), truncated=key == 2, servers=SERVERS[:2])
        journal.add("b", prediction(5))
        assert list(journal.predictions("a")) == [prediction(key) for key in sorted(order)]
        assert journal.adapters() == ["a", "b"]
        assert journal.counts("a") == Counts(scored=5, failed=0, truncated=1, n_tokens=35)
        assert journal.counts("never run") == Counts(0, 0, 0, 0)
    with Journal(path) as journal:
        assert list(journal.predictions("a")) == [prediction(key) for key in sorted(order)]


def test_what_a_server_took_part_in_can_be_withdrawn_and_computed_again(path: Path) -> None:
    alpha, beta, gamma = SERVERS
    with Journal(path, create=True) as journal:
        for key in range(4):
            journal.add("a", prediction(key), servers=[alpha, beta if key % 2 else gamma])
        journal.add("b", prediction(1), servers=[ServerUsed(beta.peer_id, 0, 3)])  # another span, the same server
        journal.add("b", prediction(2))
        assert journal.withdraw([beta.peer_id, "never seen"]) == 3
        assert journal.withdraw([beta.peer_id]) == 0
        assert (journal.done_keys("a"), journal.done_keys("b")) == ({"0", "2"}, {"2"})
        assert {server for server, _ in journal.servers()} == {alpha, gamma}
        journal.add("a", prediction(3), servers=[alpha, gamma])
        assert journal.done_keys("a") == {"0", "2", "3"}
    assert rows(path, "SELECT count(*), sum(valid) FROM scored") == [(7, 4)]


def test_keys_that_are_no_numbers_have_an_order_too(path: Path) -> None:
    with Journal(path, create=True) as journal:
        for key in ("b", "a", "10", "9"):
            journal.add("a", prediction(key))
        assert [each.key for each in journal.predictions("a")] == ["a", "b", "9", "10"]


def test_arrays_are_what_the_metrics_need(path: Path) -> None:
    with Journal(path, create=True) as journal:
        for key in (3, 1, 2):
            journal.add("a", prediction(key, label=key % 3))
        journal.add_failure("a", "0", 1, "no server")
        journal.add("a", replace(prediction(4), label=None, prediction=None))
        found = journal.scored_rows("a")
        assert found.labels[:3].tolist() == [1, 2, 0] and found.is_labelled.tolist() == [True, True, True, False]
        assert found.predictions[:3].tolist() == [prediction(key).prediction for key in (1, 2, 3)]
        assert found.starts.tolist() == [0, 3, 6, 9, 12]
        assert found.column("score").tolist() == [score for key in (1, 2, 3, 4) for score in prediction(key).scores]
        with pytest.raises(DataError, match=r"row 0 holds 24 bytes of values; expected a multiple of 16"):
            journal.scored_rows("a", ("score", "length"))


def test_rows_of_several_items_and_of_none_come_back(path: Path) -> None:
    """Choices: a row has as many items as it has choices."""
    columns = ("log_likelihood", "characters")
    values = [((-1.5, 3.0), (-2.5, 9.0)), ((-0.5, 1.0), (-0.25, 2.0), (-7.0, 4.0))]
    with Journal(path, create=True) as journal:
        assert len(journal.scored_rows("a", columns)) == 0
        for key, items in enumerate(values):
            journal.add("a", Prediction(str(key), None, None, items, 5), kind="choice")
        found = journal.scored_rows("a", columns)
        assert found.items.tolist() == [2, 3]
        assert found.column("characters").tolist() == [3.0, 9.0, 1.0, 2.0, 4.0]
        assert np.isnan(found.labels).all() and np.isnan(found.predictions).all()
        assert [each.values for each in journal.predictions("a", 2)] == values
        alone = found.chosen(np.array([False, True]))
        assert (alone.starts.tolist(), alone.column("log_likelihood").tolist()) == ([0, 3], [-0.5, -0.25, -7.0])


def test_rows_may_come_while_others_are_read(path: Path) -> None:
    """Another process writes into a run that is looked at."""
    with Journal(path, create=True) as writer:
        for key in range(50):
            writer.add("a", prediction(key))
        writer.flush()
        with Journal(path, read_only=True) as reader:
            real, came = reader._select, iter(range(50, 2000))

            def select(*arguments):
                for key in itertools.islice(came, 40):
                    writer.add("a", prediction(key))
                writer.flush()
                yield from real(*arguments)

            reader._select = select  # type: ignore[method-assign]
            found = reader.scored_rows("a")
    assert len(found) >= 90 and found.items.tolist() == [3] * len(found)


def test_a_recomputation_supersedes_and_keeps_the_old_row(path: Path) -> None:
    with Journal(path, create=True) as journal:
        journal.add("a", prediction(7, n_tokens=1), servers=SERVERS[:1])
        journal.flush()
        journal.add("a", prediction(7, n_tokens=2), servers=SERVERS[1:2])
        journal.add("a", prediction(7, n_tokens=3), servers=SERVERS[1:2])  # in the same transaction
        journal.add("b", prediction(7, n_tokens=9))  # the key of another adapter
        assert [each.n_tokens for each in journal.predictions("a")] == [3]
        assert journal.servers() == [(SERVERS[1], 1)]
    kept = rows(path, "SELECT id, n_tokens, valid, superseded_by FROM scored ORDER BY id")
    assert kept == [(1, 1, 0, 2), (2, 2, 0, 3), (3, 3, 1, None), (4, 9, 1, None)]
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("UPDATE scored SET valid = 1 WHERE id = 1")
    connection.close()


def test_a_failure_is_no_answer_and_is_tried_again(path: Path) -> None:
    with Journal(path, create=True) as journal:
        journal.add("a", prediction(1))
        journal.add_failure("a", "2", 1, "larger than any server takes", n_tokens=900, truncated=True)
        assert journal.done_keys("a") == {"1"}
        assert journal.counts("a") == Counts(scored=1, failed=1, truncated=0, n_tokens=7)
        assert [(f.key, f.label, f.reason) for f in journal.failures("a")] == [("2", 1, "larger than any server takes")]
        journal.add("a", prediction(2))
        assert journal.done_keys("a") == {"1", "2"}
        assert journal.counts("a").failed == 0


def test_servers_are_stored_once_and_found_by_what_they_touched(path: Path) -> None:
    updated = ServerUsed("12D3KooWAlpha", 0, 3, "2.3.0", "float32", None)
    with Journal(path, create=True) as journal:
        for key in range(100):
            journal.add("a", prediction(key), servers=SERVERS[:2] if key % 2 else (SERVERS[2], SERVERS[0]))
        journal.add("a", prediction(100), servers=(updated, SERVERS[1], updated))
        assert journal.servers() == [(SERVERS[0], 100), (SERVERS[1], 51), (SERVERS[2], 50), (updated, 1)]
    with Journal(path) as journal:  # ids are found again, unknown equals unknown
        journal.add("a", prediction(101), servers=(SERVERS[0], SERVERS[2]))
    assert rows(path, "SELECT count(*) FROM servers") == [(4,)]
    assert rows(path, "SELECT count(*) FROM server_sets") == [(3,)]
    touched = rows(
        path,
        "SELECT count(*) FROM scored JOIN server_set_members USING (server_set) JOIN servers ON servers.id = server"
        " WHERE peer_id = '12D3KooWBeta' AND valid = 1",
    )
    assert touched == [(51,)]


def test_rows_are_committed_together_by_number_and_by_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])

    def committed() -> int:
        return rows(path, "SELECT count(*) FROM scored")[0][0]

    with Journal(path, create=True) as journal:
        journal.add("a", prediction(0))
        assert committed() == 1  # after a quiet time at once
        journal.add("a", prediction(1))
        assert committed() == 1
        clock[0] += 0.8 * journal_module.COMMITS.min_seconds
        journal.flush_if_due()
        assert committed() == 1
        clock[0] += 0.4 * journal_module.COMMITS.min_seconds
        journal.flush_if_due()
        assert committed() == 2
        for key in range(2, 2 + journal_module.COMMITS.max_rows):
            journal.add("a", prediction(key))
        assert committed() == 2 + journal_module.COMMITS.max_rows
        journal.add("a", prediction(9999))
        journal.flush()
        assert committed() == 3 + journal_module.COMMITS.max_rows


@pytest.mark.parametrize(("takes", "rest"), [(0.05, 5.0), (3.0, journal_module.COMMITS.max_seconds)])
def test_a_slow_disk_is_waited_for_less_often(
    takes: float, rest: float, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])
    number_of = LookupTables.adapter

    def slow(tables: LookupTables, name: str) -> int:
        clock[0] += takes
        return number_of(tables, name)

    monkeypatch.setattr(LookupTables, "adapter", slow)
    with Journal(path, create=True) as journal:
        journal.add("a", prediction(0))
        journal.add("a", prediction(1))
        clock[0] += 0.9 * rest
        journal.flush_if_due()
        assert len(journal._pending) == 1
        clock[0] += 0.2 * rest
        journal.flush_if_due()
        assert not journal._pending


def test_closing_commits_also_after_another_error(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Journal(path, create=True) as journal:
        for key in range(10):
            journal.add("a", prediction(key))
        raise ZeroDivisionError
    journal.close()  # twice does no harm
    with Journal(path) as journal:
        assert len(journal.done_keys("a")) == 10
    assert [each.name for each in path.parent.iterdir()] == ["journal.sqlite"]


def test_several_threads_write_at_once(path: Path) -> None:
    with Journal(path, create=True) as journal:

        def write(start: int) -> None:
            for key in range(start, start + 200):
                journal.add("a", prediction(key), servers=SERVERS[:2])

        threads = [threading.Thread(target=write, args=(start,)) for start in range(0, 800, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.done_keys("a") == {str(key) for key in range(800)}


def test_a_journal_takes_up_all_rows_of_others(path: Path, tmp_path: Path) -> None:
    others = [tmp_path / "one.sqlite", tmp_path / "two.sqlite"]
    for number, other in enumerate(others):
        with Journal(other, create=True) as journal, journal.session("a"):
            journal.add("b", prediction(number), servers=[SERVERS[number], SERVERS[2]])
            journal.add("a", prediction(number, n_tokens=1), servers=SERVERS[:1])
            journal.flush()
            journal.add("a", prediction(number, n_tokens=2), servers=[SERVERS[number]])
            journal.add_failure("a", str(10 + number), 1, "too long")
    with Journal(path, create=True) as journal:
        with Journal(others[0], read_only=True) as one, Journal(others[1], read_only=True) as two:
            journal.absorb([one, two])
        assert list(journal.predictions("a")) == [prediction(0, n_tokens=2), prediction(1, n_tokens=2)]
        assert list(journal.predictions("b")) == [prediction(0), prediction(1)]
        assert [each.key for each in journal.failures("a")] == ["10", "11"]
        assert dict(journal.servers()) == {SERVERS[0]: 2, SERVERS[1]: 2, SERVERS[2]: 2}
        assert journal.seconds("a") > 0
    kept = rows(path, "SELECT old.n_tokens, new.n_tokens FROM scored old JOIN scored new ON old.superseded_by = new.id")
    assert kept == [(1, 2), (1, 2)]
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_taking_up_others_is_done_whole_or_not_at_all(path: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with Journal(tmp_path / name, create=True) as journal:
            journal.add("a", prediction(name == "two"))
            journal.add("a", prediction("in both"))
    with Journal(path, create=True) as journal:
        with Journal(tmp_path / "one") as one, Journal(tmp_path / "two") as two, pytest.raises(sqlite3.IntegrityError):
            journal.absorb([one, two])
        assert journal.is_blank()
        journal.add("a", prediction(5))
    assert rows(path, "SELECT key FROM scored") == [("5",)]


def test_an_interrupt_at_any_line_of_a_commit_doubles_nothing(path: Path) -> None:
    """Ctrl-C as Python itself raises it, at every line of a flush in turn; then the journal is closed."""
    folder = path.parent
    lines = 0
    while True:
        path = folder / f"{lines}.sqlite"
        journal = Journal(path, create=True)
        for key in range(3):
            journal._pending.append(_waiting(key))
        countdown = lines

        def trace(frame, event, argument):
            nonlocal countdown
            if frame.f_code.co_filename != journal_module.__file__:
                return None
            if event == "line":
                countdown -= 1
                if countdown < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        interrupted = False
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            journal.flush()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        journal.close()
        assert rows(path, "SELECT count(*), sum(valid) FROM scored") == [(3, 3)], lines
        if not interrupted:
            break
        lines += 1
    assert lines > 10


def _waiting(key: int) -> Row:
    return Row("a", SERVERS[:2], str(key), "", "classification", "ok", 0, 1, b"", 1, 1, False, None, float(key))


def test_a_signal_waits_until_a_commit_is_done(path: Path) -> None:
    """What the command's handler of a second Ctrl-C does, called in the middle of a transaction."""
    happened = []
    with Journal(path, create=True) as journal:
        journal.add("a", prediction(0))
        journal._pending.append(_waiting(1))
        real = journal._insert_together

        def insert(row: list[Row]) -> None:
            deliver(lambda: happened.append(rows(path, "SELECT count(*) FROM scored")[0][0]))
            assert not happened
            real(row)

        journal._insert_together = insert  # type: ignore[method-assign]
        journal.flush()
        assert happened == [2], "not before the commit"
        deliver(lambda: happened.append(0))
        assert happened == [2, 0]


def test_sessions_add_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: clock[0])
    with Journal(path, create=True) as journal:
        with journal.session("a"):
            clock[0] += 2.0
            journal.add("a", prediction(1))
            clock[0] += 1.0
        clock[0] += 50.0
        with pytest.raises(ZeroDivisionError), journal.session("a"):
            clock[0] += 0.5
            raise ZeroDivisionError
        assert journal.seconds("a") == 3.5
        assert journal.seconds("b") == 0.0
    with Journal(path) as journal:
        assert journal.seconds("a") == 3.5


WRITER = """
import sys
from pathlib import Path
from petals_eval.runs import Journal, ServerUsed
from petals_eval.tasks.requests import Prediction
journal = Journal(Path(sys.argv[1]), create=True)
done = journal.done_keys("a")
for key in range(100000):
    if str(key) in done:
        continue
    journal.add("a", Prediction(str(key), 0, 1, ((0.1,), (0.2,)), 5), servers=[ServerUsed("peer", 0, 5)])
    if key % 20 == 19:
        journal.flush()
        print(key, flush=True)
"""


def test_a_killed_writer_loses_nothing_committed_and_doubles_nothing(path: Path) -> None:
    random = np.random.default_rng(4)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        last = -1
        for _ in range(int(random.integers(1, 30))):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
        last = max([last, *(int(key) for key in rest if key.isdigit() and rest[-1] != key)])
        with Journal(path) as journal:
            done = journal.done_keys("a")
            assert {str(key) for key in range(last + 1)} <= done
            assert journal.counts("a").scored == len(done)
            assert journal.servers() == [(ServerUsed("peer", 0, 5), len(done))]
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
        assert rows(path, "SELECT count(*) FROM scored WHERE valid = 0") == [(0,)]


def test_a_full_disk_stops_the_run_and_loses_nothing_committed(path: Path) -> None:
    with pytest.raises(MachineError, match="The disk is full: free some space") as stopped:  # noqa: SIM117
        with Journal(path, create=True) as journal:
            for key in range(20):
                journal.add("a", prediction(key))
            journal.flush()
            pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
            journal._connection.execute(f"PRAGMA max_page_count = {pages}")
            for key in range(20, 5000):
                journal.add("a", prediction(key), servers=SERVERS)
    assert stopped.value.exit_code == 4
    with Journal(path) as journal:
        committed = journal.done_keys("a")
        assert committed >= {str(key) for key in range(20)}
        for key in range(5000):  # with space again, the run goes on
            if str(key) not in committed:
                journal.add("a", prediction(key), servers=SERVERS)
        assert len(journal.done_keys("a")) == 5000


def test_rows_refused_by_a_full_disk_wait_and_can_be_committed_later(path: Path) -> None:
    with Journal(path, create=True) as journal:
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(MachineError):
            for key in range(5000):
                journal.add("a", prediction(key), servers=SERVERS)
                last = key + 1
        journal._connection.execute("PRAGMA max_page_count = 100000")
        journal.flush()
        assert journal.done_keys("a") == {str(key) for key in range(last + 1)}
        assert sum(n for _, n in journal.servers()) == 3 * (last + 1)


def test_a_file_that_may_not_grow_is_the_machines_fault(path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + WRITER
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
        timeout=120,
    )
    assert "MachineError" in result.stderr.splitlines()[-1], result.stderr
    with Journal(path) as journal:
        last = int(result.stdout.split()[-1])
        assert {str(key) for key in range(last + 1)} <= journal.done_keys("a")


def test_a_folder_without_permission_is_the_machines_fault() -> None:
    with reachable_folder() as folder:
        folder.chmod(0o555)
        with unprivileged(), pytest.raises(MachineError, match="check the permissions of the folder") as refused:
            Journal(folder / "journal.sqlite", create=True)
        assert refused.value.exit_code == 4
        folder.chmod(0o700)
        with unprivileged(), pytest.raises(MachineError, match="Permission denied"):
            Journal(folder / "journal.sqlite")


def test_a_finished_journal_is_read_where_nothing_may_be_written() -> None:
    with reachable_folder() as folder:
        path = folder / "journal.sqlite"
        with Journal(path, create=True) as journal:
            journal.add("a", prediction(1))
        path.chmod(0o444)
        folder.chmod(0o555)
        with unprivileged():
            with Journal(path, read_only=True) as journal:
                assert journal.done_keys("a") == {"1"}
            with pytest.raises(MachineError, match="make it writable, or choose another folder"):
                Journal(path)


def test_a_running_journal_can_be_read_beside_its_writer(path: Path) -> None:
    with Journal(path, create=True) as writer:
        writer.add("a", prediction(1))
        writer.flush()
        with Journal(path, read_only=True) as reader:
            assert reader.done_keys("a") == {"1"}
            writer.add("a", prediction(2))
            writer.flush()
            assert reader.done_keys("a") == {"1", "2"}


def test_files_of_others_and_of_the_future_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found none"):
        Journal(path)
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(RunFolderError, match="another program's SQLite file"):
        Journal(foreign, create=True)
    (tmp_path / "text.sqlite").write_text("this is not a database, it is a text of some length" * 20)
    with pytest.raises(RunFolderError, match="not a database"):
        Journal(tmp_path / "text.sqlite", create=True)
    Journal(path, create=True).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(RunFolderError, match=r"found 3\. A newer petals-eval wrote it"):
        Journal(path)


def test_a_journal_whose_making_was_cut_short_is_made_again(path: Path) -> None:
    path.touch()
    with Journal(path, create=True) as journal:
        journal.add("a", prediction(1))
        assert journal.done_keys("a") == {"1"}


def test_memory_does_not_grow_with_the_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: 1000.0)  # committed by their number alone

    def peak(first: int, last: int) -> int:
        tracemalloc.start()
        for key in range(first, last):
            journal.add("a", prediction(key), servers=SERVERS[:2])
        assert sum(1 for _ in journal.predictions("a")) == last
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    with Journal(path, create=True) as journal:
        waiting = journal_module.COMMITS.max_rows
        few = peak(0, waiting)
        assert peak(waiting, 5 * waiting) < 1.2 * few + 100_000

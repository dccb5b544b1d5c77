"""The run folder: manifest.json, journal.sqlite, and at the end predictions.jsonl, metrics.json and report.md.

Generated texts are in `texts.jsonl`, of all adapters, where the run was told to keep them: its manifest's setting
`save_texts`. Predictions of a run with one adapter are in `predictions.jsonl`; with several each has its own
`predictions.<adapter>.jsonl`, and so has the run without the prompts. Examples that could not be computed are in
`failures.jsonl`, which is there only if there are any. Everything but the journal is made from the journal.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from petals_eval.errors import MachineError, RunFolderError
from petals_eval.metrics.scored_rows import CLUSTER
from petals_eval.runs.disk import TEMPORARY_SUFFIX, blame_the_machine, write_atomically
from petals_eval.runs.journal import Journal
from petals_eval.runs.manifest import SCHEMA_VERSION, Manifest, NoiseRecord, NoisyServer, WireRecord, difference
from petals_eval.runs.results import WITHOUT_POSITIONS, RunResult, run_result
from petals_eval.runs.texts import TEXTS_FILE, TextFile
from petals_eval.tasks.requests import Prediction
from petals_eval.text import listed
from petals_eval.validation import closest_beside

__all__ = ["DEFAULT_PARENT", "RunFolder", "check_folder", "holds_finished", "new_default_folder"]

PREDICTIONS_SCHEMA = 2


DEFAULT_PARENT = "runs"
"""Where the folders of runs are made that were given none."""


class RunFolder:
    """One run's folder, open. Use it as a context manager, or close it.

    path: the folder. manifest: as on disk. journal: open with it.
    resumed: it held an unfinished run of the same manifest, and this goes on with it.
    """

    def __init__(self, path: Path, manifest: Manifest, journal: Journal, *, resumed: bool, lock: int | None):
        self.path = path
        self.manifest = manifest
        self.journal = journal
        self.resumed = resumed
        self._lock = lock
        self._texts = TextFile(path / TEXTS_FILE) if manifest.answer_settings.get("save_texts") else None
        if self._texts is not None and lock is not None:
            journal.before_commit.append(self._texts.flush)

    @classmethod
    def create(cls, path: str | Path | None, manifest: Manifest, *, task: str) -> "RunFolder":
        """Begin a run, or go on with the unfinished one that lies there.

        path: None makes `runs/<task>-<year-month-day-hour-minute>` below the current folder.

        Raises RunFolderError where the folder holds a finished run, another run (the message shows the difference),
        something else, or is in use by another process; MachineError where it cannot be written.
        """
        folder = new_default_folder(task) if path is None else Path(path)
        _refuse_file(folder)
        with blame_the_machine(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        try:
            found = _unfinished(folder, manifest)
            if found is not None:
                manifest = manifest.going_on_from(found)
            manifest.write(folder / "manifest.json")
            journal = Journal(folder / "journal.sqlite", create=True)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, journal, resumed=found is not None, lock=lock)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open a run to read it: finished, interrupted or still under way. Raises RunFolderError, MachineError."""
        folder = Path(path)
        with blame_the_machine(folder):
            if not (folder / "manifest.json").is_file():
                raise RunFolderError(_no_run(folder))
        manifest = Manifest.read(folder / "manifest.json")
        return cls(folder, manifest, Journal(folder / "journal.sqlite", read_only=True), resumed=False, lock=None)

    def result(self) -> RunResult:
        """Compute the result anew from the journal as it stands: of a run that is finished, interrupted or under way.

        Raises RunFolderError where the manifest does not say what to compute, MachineError.
        """
        return run_result(
            self.manifest,
            self.journal,
            task=str(self.manifest.task.get("name", "run")),
            metrics=self.names_of("metrics"),
            label_names=self.names_of("label_names"),
            retries=self.noted_retries(),
        )

    def names_of(self, setting: str) -> list[str]:
        """Return the names that a setting of the run lists. Raises RunFolderError where the manifest has none."""
        names = self.manifest.run_settings.get(setting)
        if not isinstance(names, list):
            raise RunFolderError(f"Expected {setting} in the manifest of {self.path}; found none.")
        return [str(name) for name in names]

    def noted_retries(self) -> int:
        """Return the retries of the last session, which metrics.json has; 0 before there is one."""
        path = self.path / "metrics.json"
        with blame_the_machine(path):
            text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        try:
            return int(json.loads(text).get("retries", 0))
        except (ValueError, TypeError, AttributeError):
            raise RunFolderError(f"Expected the metrics of a run in {path}; found something else.") from None

    def finish(self, result: RunResult, *, report: str | None = None) -> None:
        """Write predictions, metrics and report, and mark the run as finished. The last step is the mark, so a run that
        dies here is finished by running it again.

        report: Markdown.
        """
        self.write_results(result, report=report)
        self.manifest = self.manifest.finish(server for server, _ in self.journal.servers())
        self.manifest.write(self.path / "manifest.json")

    def save_text(self, adapter: str, prediction: Prediction) -> None:
        """Keep what was generated, if the run keeps texts; to be called before its row is added.

        Raises MachineError.
        """
        if self._texts is not None and prediction.text is not None:
            self._texts.add(adapter, prediction)

    def texts(self, adapter: str) -> dict[str, str]:
        """Return the texts that were kept, by the keys of their examples. Raises RunFolderError, MachineError."""
        return {} if self._texts is None else self._texts.texts(adapter)

    def with_texts(self, adapter: str, predictions: Iterable[Prediction]) -> tuple[Prediction, ...]:
        """Return an adapter's predictions with the texts that were kept. Raises as `texts` does."""
        found = {} if self._texts is None else self._texts.generated(adapter)
        nothing = None, None
        filled = ((each, found.get(each.key, nothing)) for each in predictions)
        return tuple(replace(each, text=text, finish=finish) for each, (text, finish) in filled)

    def absorb_texts(self, parts: "Iterable[RunFolder]") -> None:
        """Copy the texts of other folders. Raises MachineError."""
        for part in parts:
            if self._texts is not None and part._texts is not None:
                self._texts.absorb(part._texts)

    def note_noisy(self, found: Iterable[NoisyServer], *, cleared: Collection[str] = ()) -> None:
        """Note on disk, for a resumed run too, whose answers were unequal. Raises MachineError.

        cleared: peer ids that were disputed, and are no more.
        """
        manifest = self.manifest.with_noisy(found, cleared)
        if manifest != self.manifest:
            self.manifest = manifest
            manifest.write(self.path / "manifest.json")

    def note_wire(self, record: WireRecord) -> None:
        """Note on disk what is known of the lossy wire so far. Raises MachineError."""
        if record != self.manifest.wire:
            self.manifest = self.manifest.model_copy(update={"wire": record})
            self.manifest.write(self.path / "manifest.json")

    def note_noise(self, records: Iterable[NoiseRecord]) -> None:
        """Note on disk what came of computing rows again. Raises MachineError."""
        self.manifest = self.manifest.model_copy(update={"noise": tuple(records)})
        self.manifest.write(self.path / "manifest.json")

    def write_results(self, result: RunResult, *, report: str | None = None) -> None:
        """Write what there is so far; the run stays unfinished. Raises MachineError."""
        for adapter, name in self.prediction_files(result).items():
            write_atomically(self.path / name, self._prediction_lines(adapter))
        if self._texts is not None:
            names = self.journal.adapters()
            self._texts.put_in_order((name, key) for name in names for key in self.journal.scored_keys(name))
        failures = list(self._failure_lines(result))
        if failures:
            write_atomically(self.path / "failures.jsonl", failures)
        else:
            with blame_the_machine(self.path / "failures.jsonl"):
                (self.path / "failures.jsonl").unlink(missing_ok=True)
        if report is not None:
            write_atomically(self.path / "report.md", [report])
        text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / "metrics.json", [text, "\n"])

    @staticmethod
    def prediction_files(result: RunResult) -> dict[str, str]:
        """Return the file name of the predictions of each name in the journal: an adapter's, or that of a draw."""
        names = [each.adapter for adapter in result.adapters.values() for each in adapter.in_journal]
        bare = [] if result.without_prompts is None else [each.adapter for each in result.without_prompts.in_journal]
        alone = len(names) == 1
        files = {names[0]: "predictions.jsonl"} if alone else {}
        for name in names[len(files) :] + bare:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "adapter"
            taken, count = stem, 2
            while f"predictions.{taken}.jsonl" in files.values():
                taken, count = f"{stem}-{count}", count + 1
            files[name] = f"predictions.{taken}.jsonl"
        return files

    def _prediction_lines(self, adapter: str) -> Iterator[str]:
        in_dispute = {each.peer_id for each in self.manifest.noisy_servers if each.verdict == "disputed"}
        disputed = self.journal.keys_computed_by(adapter, in_dispute)
        columns, kind = self.manifest.answer_columns, self.manifest.kind
        for each in self.journal.predictions(adapter, len(columns)):
            line: dict[str, object] = {
                "schema_version": PREDICTIONS_SCHEMA,
                "kind": kind,
                "key": each.key,
                "row_hash": each.row_hash,
                "label": _shown(each.label, kind),
                "prediction": _shown(each.prediction, kind),
                **_named(each, columns, kind),
                "n_requests": each.n_requests,
                "n_tokens": each.n_tokens,
            }
            if each.key in disputed:
                line["disputed"] = True
            yield json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"

    def _failure_lines(self, result: RunResult) -> Iterator[str]:
        for adapter in self.prediction_files(result):
            for failure in self.journal.failures(adapter):
                line = {
                    "schema_version": PREDICTIONS_SCHEMA,
                    "kind": self.manifest.kind,
                    "adapter": adapter,
                    "key": failure.key,
                    "row_hash": failure.row_hash,
                    "label": _shown(failure.label, self.manifest.kind),
                    "reason": failure.reason,
                }
                yield json.dumps(line, ensure_ascii=False) + "\n"

    def close(self) -> None:
        """Commit what waits, close the journal and let go of the folder."""
        try:
            self.journal.close()
        finally:
            self._close_texts()
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that ended before it scored anything leaves nothing: corrected, it may use the same folder.
        abandoned = error is not None and not self.resumed and self._holds_nothing()
        try:
            self.journal.__exit__(kind, error, trace)
            self._close_texts()
            if abandoned:
                self._remove()
        finally:
            self._unlock()

    def _close_texts(self) -> None:
        if self._texts is not None:
            with contextlib.suppress(MachineError):  # whatever counts was on the disk before its row
                self._texts.close()

    def _holds_nothing(self) -> bool:
        """Return whether nothing is lost with the journal: failures alone are tried again by any later run."""
        with contextlib.suppress(MachineError):
            return self.journal.is_blank()
        return False

    def _remove(self) -> None:
        """Remove what `create` made; a folder that holds anything else stays."""
        with contextlib.suppress(OSError):
            for name in ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm", "manifest.json", TEXTS_FILE):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _shown(number: float | None, kind: str) -> int | float | None:
    """Return a label or a prediction as files have it: the position of a label or a choice is a whole number."""
    return number if number is None or kind in WITHOUT_POSITIONS else int(number)


def _named(prediction: Prediction, columns: Sequence[str], kind: str) -> dict[str, object]:
    """Return the values of a prediction by their columns: a number, or a list where there are several items.

    What is not known, NaN, is left out. A classification has the probabilities instead.
    """
    found: dict[str, object] = {}
    if CLUSTER in columns:
        found[CLUSTER] = int(prediction.values[0][columns.index(CLUSTER)])
    if kind == "classification":
        return {"probabilities": prediction.probabilities, **found}
    for name, column in zip(columns, zip(*prediction.values, strict=True), strict=True):
        if name == CLUSTER:
            continue
        known = [None if value != value else value for value in column]
        if any(value is not None for value in known):
            found[name] = known[0] if len(known) == 1 else known
    return found


def check_folder(path: str | Path, manifest: Manifest | None = None) -> None:
    """Raise RunFolderError where `RunFolder.create` would refuse a folder; nothing is written.

    manifest: None: that of the run is not known yet, and the folder is refused for what no run may go on with.
    """
    folder = Path(path)
    _refuse_file(folder)
    if folder.exists():
        _unfinished(folder, manifest)


def holds_finished(path: str | Path, manifest: Manifest | None = None) -> bool:
    """Return whether a run lies in a folder that is finished.

    manifest: of the run that is meant; None: it is not known yet. Raises RunFolderError where another one lies there.
    """
    place = Path(path) / "manifest.json"
    if not place.is_file():
        return False
    found = Manifest.read(place)
    if found.finished is None:
        return False
    _refuse_another(found, manifest, f"finished run in {path}", f"Look at it with petals-eval show {path}, or")
    return True


def _no_run(folder: Path) -> str:
    """Return what is wrong with a path that was given as a run's folder, and what may be meant."""
    if not folder.exists():
        return f"there is no folder {folder}.{closest_beside(folder)} Expected the folder of a run."
    if not folder.is_dir():
        return f"{folder} is a file. Expected the folder of a run."
    inside = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if (folder / "group.json").is_file():
        return f"{folder} holds a group of tasks: name the folder of one, {listed(path.name for path in inside)}."
    below = f" Did you mean one of those in it, {listed(map(str, inside))}?" if inside else ""
    return f"{folder} is a folder, but not one of a run (no manifest.json).{below}"


def _refuse_file(folder: Path) -> None:
    with blame_the_machine(folder):
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"Expected a folder at {folder}; found a file. Name another with --out.")


def _unfinished(folder: Path, manifest: Manifest | None) -> Manifest | None:
    """Return the manifest of the unfinished run that may go on here; None for an empty folder."""
    path = folder / "manifest.json"
    if not path.exists():
        with blame_the_machine(folder):
            others = sorted(each.name for each in folder.iterdir() if not _left_by_a_crash(each.name))
        if others:
            raise RunFolderError(
                f"Expected {folder} to be empty or to hold an unfinished run; found {listed(others)}. "
                "Name another with --out."
            )
        return None
    found = Manifest.read(path)
    if found.finished is not None:
        raise RunFolderError(
            f"Expected {folder} to be empty or to hold an unfinished run; found a run that was finished at "
            f"{found.finished}. Name another folder with --out."
        )
    other_code = manifest is not None and found.answer_settings.get("code") != manifest.answer_settings.get("code")
    if other_code or found.schema_version < SCHEMA_VERSION:
        raise RunFolderError(
            f"Expected the unfinished run in {folder} to be of this version of petals-eval; found one of another, "
            "whose answers may differ. Finish it with the version it was begun with, or name another folder with --out."
        )
    _refuse_another(found, manifest, f"unfinished run in {folder}", "Run it with the settings it was begun with, or")
    return found


def _refuse_another(found: Manifest, wanted: Manifest | None, what: str, advice: str) -> None:
    """Raise RunFolderError where the run that was found is another one than the one wanted, with the difference."""
    different = [] if wanted is None else difference(found, wanted)
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise RunFolderError(
            f"Expected the {what} to be this one; found another:\n{lines}\n{advice} name another folder with --out."
        )


def _left_by_a_crash(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def new_default_folder(name: str) -> Path:
    """Make a new folder `runs/<name>-<year-month-day-hour-minute>` and return its path. Raises MachineError."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"
    stem = f"{stem}-{datetime.now():%Y-%m-%d-%H%M}"
    count = 1
    while True:
        folder = Path(DEFAULT_PARENT) / (stem if count == 1 else f"{stem}-{count}")
        with blame_the_machine(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                count += 1
                continue
        return folder


def _lock(folder: Path) -> int:
    """Hold the folder for this process; the system lets go of it when the process dies."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return handle  # a network file system without locks: SQLite's own still keep the journal whole
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunFolderError(
                f"Expected {folder} to be free; found another process that writes a run there. "
                "Wait until it ends, or name another folder with --out."
            ) from error
        raise
    return handle

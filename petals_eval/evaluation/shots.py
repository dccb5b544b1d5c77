"""What a run asks to stand around its questions, and the shots that are drawn for it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from petals_eval.config import PromptSettings
from petals_eval.data import DataSource, Row, Rows, is_local, load_rows, rows_of, sample
from petals_eval.data.sampling import sampled_positions
from petals_eval.environment import local_path
from petals_eval.errors import ConfigError, DataError
from petals_eval.tasks import Task, resolve_source
from petals_eval.tasks.prompted import Prompting
from petals_eval.tasks.row_code import RowCode, load_row_code
from petals_eval.tasks.shots import Draw, Shots, content_in_both, draw_shots
from petals_eval.text import plural
from petals_eval.validation import SETTINGS, explain

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RowsAndShots", "row_code_of", "rows_and_shots", "with_prompt"]


@dataclass(frozen=True, eq=False)
class RowsAndShots:
    """rows: what is evaluated. draws: of shots; empty without any. left_out: rows that were drawn as shots.
    notes: what a person should know of them."""

    rows: Rows
    draws: tuple[Draw, ...]
    left_out: int = 0
    notes: tuple[str, ...] = ()


def with_prompt(task: Task, wanted: PromptSettings) -> Task:
    """Return the task with what a run asks for instead of its own. Raises ConfigError where it cannot have it."""
    shots = {"count": wanted.shots, "split": wanted.shots_split, "seed": wanted.shots_seed}
    shots = {name: value for name, value in shots.items() if value is not None}
    changes = {name: getattr(wanted, name) for name in ("system", "bos") if getattr(wanted, name) is not None}
    if wanted.chat:
        changes["chat"] = True
    if shots or changes or wanted.shots_data is not None or wanted.draws > 1:
        if not isinstance(task, Prompting):
            raise ConfigError(f"shots, chat, system, bos: task {task.name} is of a class that has none of them.")
        if "bos" in changes and "bos" not in type(task).model_fields:
            raise ConfigError(f"bos: a task of kind {task.kind} takes its opening tokens from the tokenizer.")
        if shots or wanted.shots_data is not None:
            changes["shots"] = _shots(task, shots, wanted.shots_data)
        name, changed = task.name, task.model_copy(update=changes)
        if problem := changed.prompt_problem():
            raise ConfigError(f"task {name}: {problem}.")
        _check_draws(changed, wanted)
        return cast(Task, changed)
    return task


def row_code_of(task: Task, *, is_allowed: bool) -> RowCode | None:
    """Return the function that prepares the task's rows, or None. Raises TaskError as `load_row_code` does."""
    if not isinstance(task, Prompting) or task.prepare is None:
        return None
    return load_row_code(task.prepare, task=task.name, folder=task._folder, is_allowed=is_allowed)


def rows_and_shots(
    task: Task,
    rows: Rows,
    source: DataSource | None,
    code: RowCode | None,
    *,
    limit: int | None,
    seed: int,
    draws: int,
) -> RowsAndShots:
    """Sample the rows to be evaluated, and draw the shots of all draws; what equals one that all rows share leaves the
    evaluation, wherever the shots come from.

    Of several draws none is evaluated on the shots of another one, so that all of them are scored on the same rows.
    rows: all there are; where a task evaluates documents, these are made of prepared rows. source: where rows come
    from; None: from memory. code: prepares them, and those of shots.
    draws: how many; the seeds are the task's and those after it.
    Raises DataError for rows and shots that cannot be used, with the row.
    """

    def prepared(rows: Rows) -> Rows:
        return rows if code is None else code.of(rows)

    whole = getattr(task, "documents", lambda rows: rows)(prepared(rows))
    check = getattr(task, "check", lambda rows: None)
    if not isinstance(task, Prompting) or task.shots is None or not task.wants_shots:
        evaluated = sample(whole, limit, seed)
        check(evaluated)
        return RowsAndShots(evaluated, ())
    settings = task.shots
    pool, is_shared, notes = _pool(settings, source, whole, prepared)
    showing = task.drawing_from(pool)
    answered = _answered(showing, pool)
    if answered is not None:
        lacking = len(pool) - len(answered)
        which = f"{plural(lacking, 'row')} of {pool.name}"
        notes.append(f"{which} {'has' if lacking == 1 else 'have'} no answer to show: not drawn as shots")
        pool = pool.at(answered)
        showing = task.drawing_from(pool)
    seeds = [settings.seed + number for number in range(draws)]

    def label_of(row: Row) -> str | None:
        return showing.shown_turn(row).answer

    def drawn(evaluated: Rows) -> tuple[Draw, ...]:
        return tuple(
            draw_shots(settings, pool, evaluated, seed=each, is_shared=is_shared, label_of=label_of) for each in seeds
        )

    if not settings.is_fixed:
        evaluated = sample(whole, limit, seed)
        check(evaluated)
        if not is_shared or len(evaluated) < len(whole):
            check(pool)  # any of them may be drawn
        return RowsAndShots(evaluated, drawn(evaluated), notes=tuple(notes))
    found = drawn(whole)
    shown = {at for draw in found for at in draw.fixed or ()}
    if answered is not None:
        shown = {int(answered[at]) for at in shown}
    for draw in found:
        for row in draw.reader.at(draw.fixed or ()):
            showing.shown_turn(row)  # one without an answer shows before anything is sent
    content = content_in_both(pool, whole)
    contents = {content(row) for draw in found for row in draw.reader.at(draw.fixed or ())}
    left_out = _left_out(whole, limit, seed, shown if is_shared else set(), lambda row: content(row) in contents)
    evaluated = sample(whole, limit, seed, leave_out=left_out)
    check(evaluated)
    if left_out:
        are, equal = ("is", "equals") if len(left_out) == 1 else ("are", "equal")
        verb = are if is_shared and len(left_out) == len(shown) else equal
        shots = "shots" if draws == 1 else f"shots of one of the {draws} draws"
        notes.append(
            f"{plural(len(left_out), 'row')} of {whole.name} {verb} {shots} and {are} left out of the evaluation"
        )
    return RowsAndShots(evaluated, found, len(left_out), tuple(notes))


def _answered(showing: Prompting, pool: Rows) -> "np.ndarray | None":
    """Return the ascending positions (int64) of the rows with an answer, where others may be without; None: all have.

    Where none may be without, the checks of the rows and of the shots tell of the first that is.
    """
    if getattr(showing, "unlabelled", "error") == "error":
        return None
    import numpy as np

    found = [at for at, row in enumerate(pool) if showing.shown_turn(row, may_lack_answer=True).answer]
    return None if len(found) == len(pool) else np.array(found, np.int64)


def _left_out(
    whole: Rows, limit: int | None, seed: int, shown: Collection[int], is_shown: Callable[[Row], bool]
) -> set[int]:
    """Return the positions of rows that are shots or equal one, as many as the sample meets: no others are read."""
    left_out = set(shown)
    while True:
        chosen = sampled_positions(whole, limit, seed, leave_out=left_out)
        places = range(len(whole)) if chosen is None else chosen.tolist()
        evaluated = whole if chosen is None else whole.at(chosen)
        equal = {at for at, row in zip(places, evaluated, strict=True) if is_shown(row)}
        if not equal:
            return left_out
        left_out |= equal


def _shots(task: Prompting, changes: dict[str, Any], data: str | None) -> Shots | None:
    before = {} if task.shots is None else {name: getattr(task.shots, name) for name in task.shots.model_fields_set}
    if data is not None:
        before.pop("rows", None)
        source = resolve_source(task, data)  # type: ignore[arg-type]
        # Not the split that the task evaluates, where this is its own data set: that of the shots.
        changes = {**changes, "data": source.model_copy(update={"split": changes.get("split")})}
    if "split" in changes:
        before.pop("rows", None)
    try:
        return Shots.model_validate({**before, **changes})
    except ValidationError as error:
        raise ConfigError(f"shots: {explain(error, Shots, SETTINGS)}") from error


def _check_draws(task: Prompting, wanted: PromptSettings) -> None:
    """Raise ConfigError where several draws would be the same one, and where no seed draws anything."""
    asked = "draws" if wanted.draws > 1 else "shots_seed"
    if wanted.draws == 1 and wanted.shots_seed is None:
        return
    if not task.wants_shots or task.shots is None:
        raise ConfigError(f"{asked}: there are no shots to be drawn. Ask for some with --shots.")
    if task.shots.how == "first":
        which = "those that are written out" if task.shots.rows is not None else "the first rows there are"
        raise ConfigError(f"{asked}: these shots are {which}, and the same in every draw, whatever its seed.")


def _pool(
    settings: Shots, source: DataSource | None, whole: Rows, prepared: Callable[[Rows], Rows]
) -> tuple[Rows, bool, list[str]]:
    """Return the rows that shots are drawn from, whether these are the evaluated ones, and what to say of it."""
    if settings.rows is not None:
        return prepared(rows_of(list(settings.rows), name="the task's own shots")), False, []
    if settings.data is not None:
        wanted = settings.data
        if wanted.split is None and (not is_local(wanted) or local_path(wanted.path).is_dir()):
            wanted = wanted.model_copy(update={"split": settings.split})
    elif source is None or (is_local(source) and not local_path(source.path).is_dir()):
        note = f"shots are drawn from the evaluated rows: {whole.name} has no split {settings.split}"
        return whole, True, [note] if "split" in settings.model_fields_set else []
    elif settings.split == source.split:
        return whole, True, []
    else:
        wanted = source.model_copy(update={"split": settings.split})
    try:
        pool = prepared(load_rows(wanted))
    except DataError as error:
        raise DataError(f"shots: {error}") from error
    # The same file under another name, or the only split there is.
    if len(pool) == len(whole) and pool.fingerprint == whole.fingerprint:
        return whole, True, []
    return pool, False, []

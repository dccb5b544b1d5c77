"""Shots: rows that stand before a question with their answers, and how they are drawn."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from petals_eval.data.rows import Row, Rows, row_hash
from petals_eval.data.source import DataSource
from petals_eval.errors import DataError

__all__ = ["Draw", "Shots", "content_in_both", "draw_shots"]

LM_EVAL_SEED = 1234
"""The seed with which lm-evaluation-harness draws shots unless it is told another."""
_ROWS_KEPT = 4096
"""Rows of a pool that stay in memory; in a large one a shot is seldom drawn again soon."""


class Shots(BaseModel):
    """How many rows stand before each question with their answers, and which these are.

    count: how many; where they are written out in `rows`, all of these unless it says fewer.
    split: of the evaluated data set, or of `data`, that they are drawn from. Data in one file has no splits, so that
        they are drawn from the evaluated rows themselves. data: another file or data set to draw them from.
    rows: the shots themselves, each with the columns of a row.
    draw: "fixed": once by the seed, the same for all rows. "first": the first rows of the split, the same for all.
        "row": anew for each row, by the seed and the row's place in its source, whatever else is evaluated.
        "lm_eval": anew for each row as lm-evaluation-harness 0.4.13 draws by default, with one generator for all rows
        in their order (api/samplers.py, ContextSampler), so that a whole data set gets the shots that it has there.
    seed: of the draw.
    balanced: as many rows of each label as of any other; what is left over goes to labels drawn by the seed.
    leave_out_self: whether a row, and what equals it, is never a shot of its own question, where shots are drawn anew
        for each row: so it is unless this is false, wherever they come from. "lm_eval" takes one more out of the
        evaluated rows, or where this is true, as lm-evaluation-harness does for tasks without a test split and for
        those whose shots come from it. Out of others it draws as that does, and only a shot that equals its question,
        which that would show, is drawn again.

    Where shots are the same for all rows, what equals one of them leaves the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int | None = Field(default=None, ge=0)
    split: str = Field(default="train", min_length=1)
    data: DataSource | None = None
    rows: tuple[dict[str, Any], ...] | None = Field(default=None, min_length=1)
    draw: Literal["fixed", "first", "row", "lm_eval"] | None = None
    seed: int = LM_EVAL_SEED
    balanced: bool = False
    leave_out_self: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> "Shots":
        if self.rows is None and self.count is None:
            raise ValueError("should have a count: how many shots stand before each question")
        if self.rows is not None and self.data is not None:
            raise ValueError("should have rows or data to draw them from, not both")
        if self.rows is not None and self.number > len(self.rows):
            raise ValueError(f"should have a count of at most {len(self.rows)}, for so many rows are written out")
        if self.balanced and self.how in ("first", "lm_eval"):
            raise ValueError(
                f"should not be balanced with draw: {self.how}, which takes rows whatever their labels are"
            )
        return self

    @property
    def number(self) -> int:
        """How many shots stand before each question."""
        return self.count if self.count is not None else len(self.rows or ())

    @property
    def how(self) -> str:
        """How they are drawn: those that are written out are taken in their order."""
        return self.draw or ("fixed" if self.rows is None else "first")

    @property
    def is_fixed(self) -> bool:
        """Whether all rows have the same shots."""
        return self.how in ("fixed", "first")

    def to_json(self) -> dict[str, object]:
        """Return what decides which shots there are, but for the rows themselves."""
        return {"count": self.number, "draw": self.how, "balanced": self.balanced}


@dataclass(frozen=True, eq=False)
class Draw:
    """The shots of one draw.

    pool: the rows that they were drawn from. choose: gives the positions in `pool` of a row's shots, in their order.
    fixed: these positions where all rows have the same. sha256: of the shots, or of all that decides which they are.
    """

    pool: Rows
    choose: Callable[[Row], Sequence[int]]
    fixed: tuple[int, ...] | None
    sha256: str
    reader: "_Reader"

    def rows_for(self, row: Row) -> list[Row]:
        """Return the shots that stand before a row's question."""
        return self.reader.at(self.choose(row))


def draw_shots(
    settings: Shots,
    pool: Rows,
    evaluated: Rows,
    *,
    seed: int,
    is_shared: bool,
    label_of: Callable[[Row], Hashable] | None = None,
) -> Draw:
    """Draw shots from the rows of a pool.

    evaluated: the rows that they are for; all of them where this run does a part. is_shared: whether the pool holds
    these rows. seed: of this draw. label_of: the label of a row of the pool, for a balanced draw.
    Raises DataError where there are too few rows.
    """
    count = settings.number
    leave_out_self = settings.leave_out_self is not False
    content, reader = content_in_both(pool, evaluated), _Reader(pool)
    groups: list[Sequence[int]] = [range(len(pool))]
    if settings.balanced and label_of is not None:
        groups = _by_label(pool, label_of)
    if settings.how == "first":
        fixed: tuple[int, ...] | None = tuple(range(_enough(count, len(pool), pool)))
    elif settings.how == "fixed":
        fixed = tuple(_chosen(_Generator(str(seed)), groups, count, lambda position: True, pool))
    else:
        fixed = None
    if fixed is not None:
        same = fixed
        shown = [[row_hash(row.columns, row.columns)] for row in reader.at(fixed)]
        return Draw(pool, lambda row: same, fixed, _sha256(json.dumps(shown)), reader)
    if settings.how == "lm_eval":
        draws_one_more = settings.leave_out_self if settings.leave_out_self is not None else is_shared
        if leave_out_self and not draws_one_more:
            return _as_lm_eval_draws(pool, evaluated, count, seed, content, reader, draws_again=True)
        return _as_lm_eval_draws(pool, evaluated, count, seed, content, reader, draws_one_more=draws_one_more)

    # A row of the pool that leaves itself out has one fewer to draw from: told before anything is sent.
    for members in groups:
        _enough(count // len(groups), len(members) - (is_shared and leave_out_self), pool, of_a_label=len(groups) > 1)

    def for_row(row: Row) -> list[int]:
        own = content(row)

        def is_another(position: int) -> bool:
            [shot] = reader.at([position])
            return not (is_shared and shot.index == row.index) and content(shot) != own

        allowed = is_another if leave_out_self else lambda position: True
        return _chosen(_Generator(f"{seed} {row.index}"), groups, count, allowed, pool)

    return Draw(pool, for_row, None, _sha256(f"{pool.fingerprint} {seed} {leave_out_self}"), reader)


class _Generator:
    """Draws out of Python's generator by `random()` alone: only of this Python promises that it stays the same."""

    def __init__(self, seed: str):
        self._random = Random(seed).random

    def shuffled(self, among: Sequence[int]) -> Iterator[int]:
        """Yield all of them in random order, drawn one by one as they are asked for."""
        moved: dict[int, int] = {}
        for last in range(len(among) - 1, -1, -1):
            at = int(self._random() * (last + 1))
            yield among[moved.get(at, at)]
            moved[at] = moved.get(last, last)


def _chosen(
    generator: _Generator, groups: Sequence[Sequence[int]], count: int, allowed: Callable[[int], bool], pool: Rows
) -> list[int]:
    """Return `count` positions, as many out of each group as out of any other, in random order."""
    share, rest = divmod(count, len(groups))
    more = set(islice(generator.shuffled(range(len(groups))), rest))
    chosen: list[int] = []
    for number, members in enumerate(groups):
        wanted = share + (number in more)
        found = list(islice(filter(allowed, generator.shuffled(members)), wanted)) if wanted else []
        _enough(wanted, len(found), pool, of_a_label=len(groups) > 1)
        chosen += found
    return chosen if len(groups) == 1 else list(map(chosen.__getitem__, generator.shuffled(range(len(chosen)))))


def _by_label(pool: Rows, label_of: Callable[[Row], Hashable]) -> list[Sequence[int]]:
    groups: dict[Hashable, list[int]] = {}
    for position, row in enumerate(pool):
        groups.setdefault(label_of(row), []).append(position)
    return [groups[label] for label in sorted(groups, key=str)]


def content_in_both(pool: Rows, evaluated: Rows) -> Callable[[Row], str]:
    """Return what gives equal rows of a pool and of the evaluated rows the same text, whatever their places are.

    Equal are rows that hold the same in every column. Where the one source has more columns than the other, such as the
    labels that a hidden test set lacks, these do not count.
    """
    ours, theirs = set(pool.columns), set(evaluated.columns)
    counted = ours & theirs if ours <= theirs or theirs <= ours else None
    return lambda row: row_hash(row.columns, row.columns if counted is None else counted)


def _as_lm_eval_draws(
    pool: Rows,
    evaluated: Rows,
    count: int,
    seed: int,
    content: Callable[[Row], str],
    reader: "_Reader",
    *,
    draws_one_more: bool = False,
    draws_again: bool = False,
) -> Draw:
    """Draw for one row after the other with `Random(seed).sample`, as ContextSampler.sample of 0.4.13 does.

    draws_one_more: leave out what equals the row as that does. draws_again: draw as that does where nothing is left
    out, but then draw anew for what equals the row, by another generator: the draws of other rows stay as they are.
    """
    import numpy as np

    _enough(count + draws_one_more, len(pool), pool)
    random = Random(seed)
    hashes = [content(row) for row in pool] if draws_one_more or draws_again else []
    places: dict[int, int] = {}
    chosen = np.empty((len(evaluated), count), np.int64)
    for place, row in enumerate(evaluated):
        places[row.index] = place
        drawn = random.sample(range(len(pool)), count + draws_one_more)
        others = drawn
        if hashes:
            own = content(row)
            others = [at for at in drawn if hashes[at] != own][:count]
        if len(others) < count:
            unlike = [at for at, each in enumerate(hashes) if each != own]
            again = random if draws_one_more else Random(f"{seed} {row.index}")
            others = again.sample(unlike, _enough(count, len(unlike), pool))
        chosen[place] = others
    which = hashlib.sha256(pool.fingerprint.encode() + chosen.astype("<i8").tobytes()).hexdigest()
    return Draw(pool, lambda row: chosen[places[row.index]].tolist(), None, which, reader)


def _enough(wanted: int, found: int, pool: Rows, *, of_a_label: bool = False) -> int:
    if found < wanted:
        which = " of each label" if of_a_label else ""
        raise DataError(
            f"shots: expected at least {wanted} rows{which} to draw from in {pool.name}, found {found}. "
            "Ask for fewer shots, or name another split or file for them."
        )
    return wanted


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Reader:
    """Rows by their position, some of them kept."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._kept: OrderedDict[int, Row] = OrderedDict()

    def at(self, positions: Sequence[int]) -> list[Row]:
        import numpy as np

        missing = sorted({at for at in positions if at not in self._kept})
        read: Mapping[int, Row] = {}
        if missing:
            read = dict(zip(missing, self._rows.at(np.array(missing, np.int64)), strict=True))
        found = [read[at] if at in read else self._kept[at] for at in positions]
        self._kept.update(read)
        while len(self._kept) > _ROWS_KEPT:
            self._kept.popitem(last=False)
        return found

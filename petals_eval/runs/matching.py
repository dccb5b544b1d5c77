"""The rows that several sides have in common: found by their keys, and held against each other by what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petals_eval.errors import DataError
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.rows import KeyedRows
from petals_eval.text import listed, plural, printable

__all__ = ["MatchedRows", "match_rows"]

_SHOWN = 5  # rows that do not match


@dataclass(frozen=True, eq=False)
class MatchedRows:
    """Rows that all sides have scored.

    keys: of the examples, in the order of the first side. sides: by name, the rows of each draw of shots in this order.
    left_out: by name, how many rows of a side another one has not.
    """

    keys: tuple[str, ...]
    sides: Mapping[str, tuple[ScoredRows, ...]]
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def clusters(self) -> NDArray[np.int64] | None:
        """Which cluster each row is of, int64 (n,) from 0; None where no side knows. Raises DataError where sides
        disagree."""
        known = {name: draws[0].clusters for name, draws in self.sides.items()}
        found = {name: clusters for name, clusters in known.items() if clusters is not None}
        (first, clusters), *others = found.items() or [("", None)]
        for name, other in others:
            # Numbered in the order of their first rows, equal clusters are equal.
            if not np.array_equal(_by_first_row(clusters), _by_first_row(other)):
                raise DataError(
                    f"{printable(first)} and {printable(name)} have the same rows in other clusters. Evaluate both "
                    "with the same cluster_column in the task."
                )
        return clusters


def _by_first_row(clusters: NDArray[np.int64] | None) -> NDArray[np.int64]:
    _, first, inverse = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def match_rows(sides: Mapping[str, Sequence[KeyedRows]], *, same_data: bool = False) -> MatchedRows:
    """Match the rows of sides by their keys.

    sides: by name, the rows of each draw of shots. same_data: whether all of them read the same rows, so that a key
    stands for one row whatever columns of it a task reads.

    Raises DataError where no row is in all sides, and where rows of one key differ in their label or, unless it is
    `same_data`, in what they say, with the first of them.
    """
    every = {(name, draw): rows for name, draws in sides.items() for draw, rows in enumerate(draws)}
    first = next(iter(every.values()))
    common = set(first.keys)
    for rows in every.values():
        if rows.keys is not first.keys and rows.keys != first.keys:
            common &= set(rows.keys)
    if not common:
        raise DataError(f"no row is in all of {listed(sides)}: their keys have nothing in common.")
    keys = tuple(key for key in first.keys if key in common) if len(common) < len(first) else first.keys
    matched: dict[str, list[ScoredRows]] = {name: [] for name in sides}
    reference: tuple[str, ScoredRows, Sequence[str]] | None = None
    for (name, _), rows in every.items():
        found, hashes = _in_order(rows, keys)
        if reference is None:
            reference = name, found, hashes
        else:
            _check_same(keys, reference, (name, found, hashes), same_data=same_data)
        matched[name].append(found)
    return MatchedRows(
        keys,
        {name: tuple(draws) for name, draws in matched.items()},
        {name: len(draws[0]) - len(keys) for name, draws in sides.items() if len(draws[0]) > len(keys)},
    )


def _in_order(rows: KeyedRows, keys: Sequence[str]) -> tuple[ScoredRows, Sequence[str]]:
    if rows.keys == keys:
        return rows.rows, rows.hashes
    place = {key: position for position, key in enumerate(rows.keys)}
    positions = np.array([place[key] for key in keys])
    return rows.rows.at(positions), [rows.hashes[position] for position in positions]


def _check_same(
    keys: Sequence[str],
    one: tuple[str, ScoredRows, Sequence[str]],
    other: tuple[str, ScoredRows, Sequence[str]],
    *,
    same_data: bool,
) -> None:
    (first, rows, hashes), (second, others, other_hashes) = one, other
    labels, other_labels = rows.labels, others.labels
    differs = (labels != other_labels) & ~(np.isnan(labels) & np.isnan(other_labels))
    wrong = [
        f"{keys[row]} (label {labels[row]:g} and {other_labels[row]:g})" for row in np.flatnonzero(differs).tolist()
    ]
    if not wrong and not same_data and hashes != other_hashes:
        pairs = zip(keys, hashes, other_hashes, strict=True)
        wrong = [f"{key} (other content)" for key, this, that in pairs if this and that and this != that]
    if wrong:
        raise DataError(
            f"{printable(first)} and {printable(second)} are not of the same rows: {plural(len(wrong), 'key')} of "
            f"{len(keys):,} stand for rows that differ: {printable(listed(wrong, most=_SHOWN))}. Evaluate both on the "
            "same data, with a task that reads the same columns of it."
        )

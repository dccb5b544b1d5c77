"""A reproducible part of a data set."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from petals_eval.data.rows import Rows
from petals_eval.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["sample", "sampled_positions"]


def sample(rows: Rows, limit: int | None, seed: int, *, leave_out: Collection[int] = ()) -> Rows:
    """Return `limit` of the rows, drawn without replacement, in the order of the source; all of them for None.

    leave_out: positions of rows that are not drawn, nor among "all". The others' luck does not change by it.

    Each row gets a 64-bit key from PCG64(seed), in order; the rows with the smallest keys stay. NumPy promises that
    this stream of bits is the same on every platform and in every version, which it does not promise of
    `Generator.choice`. With one seed a smaller sample is a part of every larger one.

    Raises ConfigError for a limit below 1 or a negative seed, DataError where every row is left out.
    """
    positions = sampled_positions(rows, limit, seed, leave_out=leave_out)
    return rows if positions is None else rows.at(positions)


def sampled_positions(
    rows: Rows, limit: int | None, seed: int, *, leave_out: Collection[int] = ()
) -> "np.ndarray | None":
    """Return the ascending positions (int64) of the rows that `sample` returns; None for all. Raises as that does."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit should be at least 1, found {limit}. Leave it out to evaluate every row.")
    if seed < 0:
        raise ConfigError(f"seed should be 0 or more, found {seed}.")
    if not leave_out and (limit is None or limit >= len(rows)):
        return None
    import numpy as np

    keys = np.random.PCG64(seed).random_raw(len(rows))
    order = np.argsort(keys, kind="stable")
    if leave_out:
        order = order[~np.isin(order, list(leave_out))]
        if not len(order):
            raise DataError(f"{rows.name}: expected more rows than the {len(leave_out)} that are left out, found none.")
    chosen = order[:limit]
    return np.sort(chosen).astype(np.int64)

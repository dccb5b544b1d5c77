"""A reproducible part of a data set."""

from collections.abc import Collection

from petals_eval.data.rows import Rows
from petals_eval.errors import ConfigError, DataError

__all__ = ["sample"]


def sample(rows: Rows, limit: int | None, seed: int, *, leave_out: Collection[int] = ()) -> Rows:
    """Return `limit` of the rows, drawn without replacement, in the order of the source; all of them for None.

    leave_out: positions of rows that are not drawn, nor among "all". The others' luck does not change by it.

    Each row gets a 64-bit key from PCG64(seed), in order; the rows with the smallest keys stay. NumPy promises that
    this stream of bits is the same on every platform and in every version, which it does not promise of
    `Generator.choice`. With one seed a smaller sample is a part of every larger one.

    Raises ConfigError for a limit below 1 or a negative seed, DataError where every row is left out.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit should be at least 1, found {limit}. Leave it out to evaluate every row.")
    if seed < 0:
        raise ConfigError(f"seed should be 0 or more, found {seed}.")
    if not leave_out and (limit is None or limit >= len(rows)):
        return rows
    import numpy as np

    keys = np.random.PCG64(seed).random_raw(len(rows))
    order = np.argsort(keys, kind="stable")
    if leave_out:
        order = order[~np.isin(order, list(leave_out))]
        if not len(order):
            raise DataError(f"{rows.name}: expected more rows than the {len(leave_out)} that are left out, found none.")
    chosen = order[:limit]
    return rows.at(np.sort(chosen).astype(np.int64))

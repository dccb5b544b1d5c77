"""A part of a run: one of several that are computed apart and merged."""

import re
from dataclasses import dataclass

from petals_eval.data.rows import Rows
from petals_eval.errors import ConfigError

__all__ = ["Shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`, counted from 1: of the rows to be evaluated every count-th, beginning with the index-th.

    Interleaved, so that the parts of a file sorted by length take equally long.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "2/3". Raises ConfigError.

        >>> Shard.parse("2/3")
        Shard(index=2, count=3)
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"shard: expected I/N with I from 1 to N, such as 1/3, 2/3 and 3/3; found {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def size(self, rows: int) -> int:
        """Return how many of so many rows are in this part.

        >>> [Shard(index, 3).size(7) for index in (1, 2, 3)]
        [3, 2, 2]
        """
        return max(0, (rows - self.index) // self.count + 1)

    def of(self, rows: Rows) -> Rows:
        """Raises ConfigError where that is none."""
        import numpy as np

        if not self.size(len(rows)):
            raise ConfigError(f"shard: {len(rows)} examples make {len(rows)} parts at most; found {self}")
        return rows.at(np.arange(self.index - 1, len(rows), self.count, dtype=np.int64))

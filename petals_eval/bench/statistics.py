"""Numbers of several runs in a few: machines are noisy, so nothing is told without its spread."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "percentile"]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie, in a straight line between the two nearest.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([1.0, 2.0], 0), percentile([5.0], 90)
    (2.5, 1.0, 5.0)
    """
    if not values:
        raise ValueError("expected at least one value")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the middle and the greatest of several values."""

    least: float
    median: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(least=1.0, median=2.0, greatest=3.0)
        """
        return cls(min(values), percentile(values, 50), max(values))

    def __str__(self) -> str:
        """
        >>> str(Spread(0.12345, 9.9, 12345.6))
        '9.9 (0.123 to 12,346)'
        """
        return f"{_short(self.median)} ({_short(self.least)} to {_short(self.greatest)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

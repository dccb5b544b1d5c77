"""A benchmark held against an older one of the same kind: what got slower beyond the spread of both."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from petals_eval.bench.statistics import Spread
from petals_eval.errors import ConfigError
from petals_eval.text import plural

__all__ = ["MIN_CHANGE", "Change", "Older"]

MIN_CHANGE = 0.02
"""Of the old median: what changes by less is called the same, also where nothing spreads, as in virtual time."""


class _Point(BaseModel):
    """A case of a sweep."""

    length: int
    batch: int
    window: int | None
    wire: str
    tokens: Spread


class _Sweep(BaseModel):
    schema_version: Literal[1]
    benchmark: Literal["forward", "inference"]
    points: list[_Point]

    def measures(self) -> dict[str, Spread]:
        return {
            f"length {each.length}, batch {each.batch}, window {each.window or 'auto'}, {each.wire}": each.tokens
            for each in self.points
        }


class _Scenario(BaseModel):
    name: str
    shares: list[float]


class _Simulated(BaseModel):
    schema_version: Literal[1]
    benchmark: Literal["simulate"]
    scenarios: list[_Scenario]
    median_share: float
    tenth_percentile_share: float

    def measures(self) -> dict[str, Spread]:
        """Of several swarms what all come to: each for itself is moved by any change of who happens to be first."""
        if len(self.scenarios) > 1:
            names = ", ".join(each.name for each in self.scenarios)
            found = {"median": self.median_share, "tenth percentile": self.tenth_percentile_share}
            return {f"{name} of {names}": Spread.of([value]) for name, value in found.items()}
        return {
            f"{each.name}, evaluation {number}": Spread.of([share])
            for each in self.scenarios
            for number, share in enumerate(each.shares, start=1)
        }


class _Regime(BaseModel):
    name: str
    first: Spread
    warm: Spread


class _Paced(BaseModel):
    schema_version: Literal[1]
    benchmark: Literal["paced"]
    regimes: list[_Regime]

    def measures(self) -> dict[str, Spread]:
        return {f"{each.name}, {kind}": getattr(each, kind) for each in self.regimes for kind in ("first", "warm")}


_Benchmark = Annotated[_Sweep | _Simulated | _Paced, Field(discriminator="benchmark")]
_READER: TypeAdapter[_Sweep | _Simulated | _Paced] = TypeAdapter(_Benchmark)


@dataclass(frozen=True, slots=True)
class Change:
    """What was measured of one thing before and now; more is better."""

    name: str
    before: Spread
    now: Spread

    @property
    def is_slower(self) -> bool:
        """Whether the best of now is below the worst of before, by enough to speak of.

        >>> Change("a", Spread(9, 10, 11), Spread(8, 8.5, 8.9)).is_slower
        True
        >>> Change("a", Spread(9, 10, 11), Spread(8, 8.5, 9.1)).is_slower
        False
        """
        return self.now.greatest < self.before.least and self.now.median < (1 - MIN_CHANGE) * self.before.median


@dataclass(frozen=True, slots=True)
class Older:
    """A benchmark that was kept as JSON: the name of its file, its kind, and its measures by name."""

    file: str
    kind: str
    measures: dict[str, Spread]

    @classmethod
    def read(cls, path: Path) -> "Older":
        """Raise ConfigError where the file holds none."""
        try:
            return cls(str(path), *_measures(json.loads(path.read_text(encoding="utf-8"))))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(each) for each in first["loc"]) or "its keys"
            raise ConfigError(f"{path}: expected the JSON of a benchmark; {where}: {first['msg']}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: expected the JSON of a benchmark, found: {error}") from None

    def compare(self, found: dict[str, Any], say: Callable[[str], object]) -> int:
        """Tell what got slower in `found`, a benchmark's JSON, which it is noted in; return how many measures did.

        Raises ConfigError where it is of another kind or has nothing in common with this one.
        """
        kind, now = _measures(json.loads(json.dumps(found)))
        if kind != self.kind:
            raise ConfigError(f"{self.file}: expected the JSON of a benchmark {kind!r}, found one of {self.kind!r}")
        changes = [Change(name, self.measures[name], now[name]) for name in now if name in self.measures]
        if not changes:
            raise ConfigError(
                f"{self.file}: expected measures of {'; '.join(now)}, found those of {'; '.join(self.measures)}"
            )
        slower = [each for each in changes if each.is_slower]
        found["compared"] = {"measures": len(changes), "slower": [asdict(each) for each in slower]}
        say(f"{len(slower)} of {plural(len(changes), 'measure')} got slower than in {self.file}")
        for each in slower:
            say(f"  {each.name}: {each.now}, before {each.before}")
        return len(slower)


def _measures(benchmark: object) -> tuple[str, dict[str, Spread]]:
    read = _READER.validate_python(benchmark)
    return read.benchmark, read.measures()

"""The numerical noise of an adapter's numbers, from its rows and what the manifest has of those computed again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from petals_eval.metrics import Metric
from petals_eval.metrics.noise import FACTOR, MARGIN, noise_ranges
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.runs.manifest import NoiseRecord, Recomputed

__all__ = ["NumericalNoise", "joined_noise", "noise_over_draws", "numerical_noise"]


@dataclass(frozen=True, slots=True)
class NumericalNoise:
    """What rounding may do to the predictions of one adapter (`petals_eval.metrics.noise` has the formula).

    margin: predictions with a smaller margin are unsure; None where the kind of task has no margins, or none was
        measured. unsure, share: how many predictions that are, and which share of the scored ones; None without margin.
    ranges: of each metric, by name, between which values it lies if unsure predictions go to their runner-up.
    recomputed: how far numbers moved, in each way that was tried. notes: what could not be tried or measured, and why.
    """

    margin: float | None = None
    unsure: int | None = None
    share: float | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    recomputed: tuple[Recomputed, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which rows were computed again."""
        return tuple(dict.fromkeys(each.way for each in self.recomputed))

    def to_json(self) -> dict[str, object]:
        return {
            "margin": self.margin,
            "unsure": self.unsure,
            "share": self.share,
            "ranges": {name: list(each) for name, each in self.ranges.items()},
            "recomputed": [asdict(each) for each in self.recomputed],
            "notes": list(self.notes),
        }


def numerical_noise(
    records: Iterable[NoiseRecord],
    adapter: str,
    kind: str,
    rows: ScoredRows,
    metrics: Sequence[str],
    label_names: Sequence[str],
    found: Mapping[str, Metric],
) -> NumericalNoise | None:
    """Return the noise of one adapter's numbers; None where nobody looked for it.

    rows: all that are scored. found: the metrics of these, by name. Raises as `measure` does.
    """
    record = next((each for each in records if each.adapter == adapter), None)
    if record is None:
        return None
    noise: dict[str, float] = {}
    for each in record.recomputed:
        noise[each.number] = max(noise.get(each.number, 0.0), FACTOR * each.mean)
    told = NumericalNoise(recomputed=record.recomputed, notes=record.notes)
    if MARGIN not in noise or not len(rows):
        return told
    values = {name: metric.value for name, metric in found.items() if metric.value is not None}
    unsure, ranges = noise_ranges(kind, rows, noise, metrics, label_names, values)
    return replace(told, margin=noise[MARGIN], unsure=int(unsure.sum()), share=float(unsure.mean()), ranges=ranges)


def noise_over_draws(draws: Sequence[NumericalNoise | None]) -> NumericalNoise | None:
    """Return the noise of means over draws of shots: counts are over all of them, ranges are means of theirs."""
    known = [each for each in draws if each is not None]
    if not known or len(known) < len(draws):
        return None
    notes = tuple(dict.fromkeys(note for each in known for note in each.notes))
    recomputed = tuple(row for each in known for row in each.recomputed)
    margins = [each.margin for each in known if each.margin is not None]
    shares = [each.share for each in known if each.share is not None]
    if len(margins) < len(known):
        return NumericalNoise(recomputed=recomputed, notes=notes)
    names = [name for name in known[0].ranges if all(name in each.ranges for each in known)]
    ranges = {
        name: (
            sum(each.ranges[name][0] for each in known) / len(known),
            sum(each.ranges[name][1] for each in known) / len(known),
        )
        for name in names
    }
    unsure = sum(each.unsure or 0 for each in known)
    return NumericalNoise(max(margins), unsure, sum(shares) / len(shares), ranges, recomputed, notes)


def joined_noise(parts: Sequence[Iterable[NoiseRecord]]) -> tuple[NoiseRecord, ...]:
    """Return what the parts of a run know of its noise as what the whole knows: rows counted together."""
    by_adapter: dict[str, list[NoiseRecord]] = {}
    for records in parts:
        for record in records:
            by_adapter.setdefault(record.adapter, []).append(record)
    return tuple(
        NoiseRecord(
            adapter,
            _joined([each for record in records for each in record.recomputed]),
            tuple(dict.fromkeys(note for record in records for note in record.notes)),
        )
        for adapter, records in by_adapter.items()
    )


def _joined(found: Sequence[Recomputed]) -> tuple[Recomputed, ...]:
    alike: dict[tuple[str, str], Recomputed] = {}
    for each in found:
        key = each.way, each.number
        before = alike.get(key)
        if before is None:
            alike[key] = each
            continue
        rows = before.rows + each.rows
        mean = (before.rows * before.mean + each.rows * each.mean) / rows
        changed = None if before.changed is None or each.changed is None else before.changed + each.changed
        largest = max(before.largest, each.largest)
        alike[key] = replace(before, rows=rows, mean=mean, largest=largest, changed=changed)
    return tuple(alike.values())

"""How much two sides differ on the same rows, in every metric that both have, and how sure that is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petals_eval.errors import ConfigError
from petals_eval.metrics.estimates import are_few_clusters
from petals_eval.metrics.intervals import Floats, affordable, percentile_interval
from petals_eval.metrics.paired import (
    LEVEL,
    POWER,
    cluster_standard_error,
    detectable_share,
    holm,
    mcnemar,
    newcombe_paired,
)
from petals_eval.metrics.registry import KINDS
from petals_eval.metrics.resampling import Draws, Resampler, every_row, resampled_rows
from petals_eval.metrics.scored_rows import ScoredRows
from petals_eval.metrics.spec import MetricSpec, View

__all__ = ["Difference", "Side", "differences", "pairs_of"]

_NOT_ON_BOTH = "not defined on the rows of both"
EXACT = "exact McNemar test, Newcombe interval (1998, method 10)"


@dataclass(frozen=True, eq=False)
class Side:
    """One of several that are compared.

    kind: of its task. draws: its rows, in the order that all sides share; with several draws of shots those of each,
    and a metric is the mean over them.
    """

    name: str
    kind: str
    draws: tuple[ScoredRows, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of the first side minus that of the second, on the same rows.

    value: None where one of the two is not defined. ci95: (low, high); None where there is none.
    p_value: of the two being equal, two-sided; p_holm: corrected for all pairs that were compared in this metric.
    method: of interval and test. rows: that the metric is computed from.
    only_first, only_second: of a share, the rows that only this side has right.
    minimum_detectable: the smallest difference that so many rows show with a power of 80%; None: none.
    note: what a reader must know about this number.
    """

    metric: str
    first: str
    second: str
    first_value: float | None
    second_value: float | None
    rows: int
    method: str
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    only_first: int | None = None
    only_second: int | None = None
    minimum_detectable: float | None = None
    note: str | None = None

    @property
    def value(self) -> float | None:
        if self.first_value is None or self.second_value is None:
            return None
        return self.first_value - self.second_value

    def to_json(self) -> dict[str, object]:
        discordant = {"only_first": self.only_first, "only_second": self.only_second}
        return {
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "first_value": self.first_value,
            "second_value": self.second_value,
            "difference": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "method": self.method,
            "rows": self.rows,
            "discordant": None if self.only_first is None else discordant,
            "minimum_detectable_difference": self.minimum_detectable,
            **({} if self.note is None else {"note": self.note}),
        }


def pairs_of(names: Sequence[str], *, against: str | None = None) -> list[tuple[str, str]]:
    """Return every pair of names, or those of one of them with each other one.

    >>> pairs_of(["a", "b", "c"]), pairs_of(["a", "b", "c"], against="b")
    ([('a', 'b'), ('a', 'c'), ('b', 'c')], [('b', 'a'), ('b', 'c')])
    """
    if against is None:
        return list(combinations(names, 2))
    return [(against, name) for name in names if name != against]


def differences(
    sides: Sequence[Side],
    metrics: Iterable[str],
    *,
    label_names: Sequence[str] = (),
    seed: int = 0,
    clusters: NDArray[np.int64] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[Difference]:
    """Compare sides by pairs, metric by metric.

    sides: of the same rows with the same labels, in the same order. metrics: names that the kinds of all sides have;
    those that no interval is known for are left out. clusters: int64 (n,), from 0, where rows of one
    cluster may depend on each other. pairs: of names; None: all.

    A share is compared by McNemar's exact test and Newcombe's interval. Everything else, and a share's mean over draws
    of shots, by the paired percentile bootstrap; its p-value takes the difference for normal, with the standard error
    of the resamples. With clusters means have cluster-robust errors with Student's t, and whole clusters are drawn.

    Raises ConfigError for a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"Expected a seed of 0 or more for the bootstrap; found {seed}.")
    asked = pairs_of([side.name for side in sides]) if pairs is None else pairs
    keep = _with_label(sides[0].draws[0])
    members = [_Member(side, keep, label_names) for side in sides]
    by_name = {member.name: member for member in members}
    kept = None if clusters is None else np.unique(clusters[keep], return_inverse=True)[1].reshape(-1)
    found: dict[str, list[Difference]] = {}
    rest = []
    for metric in dict.fromkeys(metrics):
        specs = [member.specs[metric] for member in members]
        if any(spec.terms is None for spec in specs):
            found[metric] = []
            if all(spec.resampler is not None for spec in specs):
                rest.append(metric)
            continue
        terms = {name: member.terms(metric) for name, member in by_name.items()}
        names = dict.fromkeys(name for each in terms.values() for name in each[0])
        if kept is not None:
            means = {
                side: {name: np.mean([each[name] for each in draws], axis=0) for name in draws[0]}
                for side, draws in terms.items()
            }
            found[metric] = [
                _of_clusters(name, pair, [means[side].get(name) for side in pair], kept)
                for name in names
                for pair in asked
            ]
        elif all(spec.is_share for spec in specs) and all(len(each) == 1 for each in terms.values()):
            found[metric] = [
                _of_shares(name, pair, [terms[side][0].get(name) for side in pair]) for name in names for pair in asked
            ]
        else:
            found[metric] = []
            rest.append(metric)
    found |= _bootstrapped(members, rest, asked, int(keep.sum()), seed, kept)
    every = [each for several in found.values() for each in several]
    if kept is not None and are_few_clusters(kept):
        every = [_marked_as_few(each, int(kept.max()) + 1) for each in every]
    return _corrected(every)


def _marked_as_few(found: Difference, clusters: int) -> Difference:
    if found.ci95 is None:
        return found
    return replace(found, note=f"{clusters:,} clusters are few, or of very unequal sizes: it may cover less than 95%")


class _Member:
    """A side with what its metrics are computed from."""

    def __init__(self, side: Side, keep: NDArray[np.bool_], label_names: Sequence[str]):
        self.name = side.name
        self.specs: Mapping[str, MetricSpec] = {spec.name: spec for spec in KINDS[side.kind]}
        self._rows = [rows.chosen(keep) for rows in side.draws]
        self._label_names = label_names
        self._views: dict[View, list[Any]] = {}

    def views(self, metric: str) -> list[Any]:
        """Return what a metric is computed from, of each draw of shots."""
        view = self.specs[metric].view
        if view not in self._views:
            self._views[view] = [view(rows, self._label_names) for rows in self._rows]
        return self._views[view]

    def terms(self, metric: str) -> list[dict[str, Floats]]:
        """Return what the rows give to a mean, of each draw of shots; nothing for what is no mean."""
        terms = self.specs[metric].terms
        return [] if terms is None else [terms(view) for view in self.views(metric)]

    def on_draws(self, metric: str) -> list[Resampler]:
        """Return what computes a metric on resamples, of each draw of shots; nothing where there is no interval."""
        found = [self.specs[metric].on_draws(view) for view in self.views(metric)]
        return [each for each in found if each is not None]

    def passes(self, metric: str) -> int:
        return sum(self.specs[metric].passes(view) for view in self.views(metric))


def _with_label(rows: ScoredRows) -> NDArray[np.bool_]:
    """Return the rows that metrics are computed from: those with a label, or all of kinds whose rows have none."""
    return rows.is_labelled if rows.is_labelled.any() else np.ones(len(rows), dtype=np.bool_)


def _of_shares(name: str, pair: tuple[str, str], terms: Sequence[Floats | None]) -> Difference:
    first, second = terms
    if first is None or second is None:
        return Difference(name, *pair, None, None, 0, EXACT, note=_NOT_ON_BOTH)
    known = ~(np.isnan(first) | np.isnan(second))
    one, other = first[known] == 1, second[known] == 1
    both, only_first = int((one & other).sum()), int((one & ~other).sum())
    only_second, rows = int((other & ~one).sum()), len(one)
    return Difference(
        name,
        *pair,
        (both + only_first) / rows,
        (both + only_second) / rows,
        rows,
        EXACT,
        ci95=newcombe_paired(both, only_first, only_second, rows - both - only_first - only_second),
        p_value=mcnemar(only_first, only_second),
        only_first=only_first,
        only_second=only_second,
        minimum_detectable=detectable_share(rows, only_first + only_second),
    )


def _of_clusters(
    name: str, pair: tuple[str, str], terms: Sequence[Floats | None], clusters: NDArray[np.int64]
) -> Difference:
    from scipy.special import stdtr, stdtrit

    first, second = terms
    if first is None or second is None:
        return Difference(name, *pair, None, None, 0, "cluster-robust errors", note=_NOT_ON_BOTH)
    known = ~(np.isnan(first) | np.isnan(second))
    one, other = first[known], second[known]
    groups = np.unique(clusters[known], return_inverse=True)[1].reshape(-1)
    count = int(groups.max()) + 1
    error, difference = cluster_standard_error(one - other, groups), float((one - other).mean())
    is_share = bool(np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all())
    method = f"cluster-robust errors of {count:,} clusters, Student's t"
    found = Difference(
        name,
        *pair,
        float(one.mean()),
        float(other.mean()),
        len(one),
        method,
        only_first=int((one > other).sum()) if is_share else None,
        only_second=int((one < other).sum()) if is_share else None,
    )
    if not error > 0:  # one cluster, or the same difference in each
        return replace(
            found, note="no interval: the clusters do not differ" if error == 0 else "no interval of one cluster"
        )
    half = float(stdtrit(count - 1, 1 - LEVEL / 2)) * error
    return replace(
        found,
        ci95=(difference - half, difference + half),
        p_value=float(2 * stdtr(count - 1, -abs(difference) / error)),
        minimum_detectable=float(stdtrit(count - 1, 1 - LEVEL / 2) + stdtrit(count - 1, POWER)) * error,
    )


def _bootstrapped(
    members: Sequence[_Member],
    metrics: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    rows: int,
    seed: int,
    clusters: NDArray[np.int64] | None,
) -> dict[str, list[Difference]]:
    values: dict[str, dict[str, float]] = {}
    names: dict[str, list[str]] = {metric: [] for metric in metrics}
    draws: dict[str, dict[str, list[Floats]]] = {}
    resamplers = {metric: [member.on_draws(metric) for member in members] for metric in metrics}
    # Where a resample costs more than one pass over the rows all sides share what may be drawn (`affordable`).
    passes = {metric: sum(member.passes(metric) for member in members) for metric in metrics}
    counts = {metric: affordable(rows * (passes[metric] if passes[metric] > len(members) else 1)) for metric in metrics}
    every = every_row(rows)
    for metric in metrics:
        for member, each in zip(members, resamplers[metric], strict=True):
            for name, value in _mean_over(each, every).items():
                values.setdefault(name, {})[member.name] = float(value[0])
                names[metric] += [] if name in names[metric] else [name]
    done = 0
    for batch in resampled_rows(rows, seed, clusters):
        wanted = {metric: batch.first(counts[metric] - done) for metric in metrics if counts[metric] > done}
        if not wanted:
            break
        for metric, some in wanted.items():
            for member, each in zip(members, resamplers[metric], strict=True):
                for name, found in _mean_over(each, some).items():
                    draws.setdefault(name, {}).setdefault(member.name, []).append(found)
        done += batch.weights.shape[1]
    drawn = {name: {side: np.concatenate(parts) for side, parts in sides.items()} for name, sides in draws.items()}

    def of_pair(name: str, pair: tuple[str, str]) -> Difference:
        known = [values[name].get(side) for side in pair]
        return _of_draws(name, pair, known, [drawn[name].get(side) for side in pair], rows, clusters)

    return {metric: [of_pair(name, pair) for name in names[metric] for pair in pairs] for metric in metrics}


def _mean_over(resamplers: Sequence[Resampler], draws: Draws) -> dict[str, Floats]:
    """Return metrics on resamples, the means over draws of shots."""
    found = [each(draws) for each in resamplers]
    return {name: np.mean([each[name] for each in found], axis=0) for name in (found[0] if found else ())}


def _of_draws(
    name: str,
    pair: tuple[str, str],
    values: Sequence[float | None],
    drawn: Sequence[Floats | None],
    rows: int,
    clusters: NDArray[np.int64] | None,
) -> Difference:
    from scipy.special import ndtr, ndtri

    first, second = [None if each is None or math.isnan(each) else each for each in values]
    resamples = max(len(each) for each in drawn if each is not None)
    what = "" if clusters is None else f" of {int(clusters.max()) + 1:,} clusters"
    method = f"paired percentile bootstrap{what}, {resamples:,} resamples; test by their standard error"
    found = Difference(name, *pair, first, second, rows, method)
    if drawn[0] is None or drawn[1] is None or found.value is None:
        return replace(found, note=_NOT_ON_BOTH)
    with np.errstate(invalid="ignore"):
        resampled = drawn[0] - drawn[1]
    defined = resampled[~np.isnan(resampled)]
    if 2 * len(defined) <= len(resampled):
        return replace(found, note="no interval: not defined on most resamples")
    error = float(np.std(defined, ddof=1))
    if not error > 0:
        same = "all resamples have the same difference"
        return replace(found, p_value=1.0 if found.value == 0 else None, note=f"no interval: {same}")
    return replace(
        found,
        ci95=percentile_interval(defined),
        p_value=float(2 * ndtr(-abs(found.value) / error)),
        minimum_detectable=float(ndtri(1 - LEVEL / 2) + ndtri(POWER)) * error,
    )


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """Return the differences with Holm's p-values over all pairs of each metric."""
    corrected = []
    for _, alike in groupby(found, key=lambda each: each.metric):
        several = list(alike)
        tested = [each for each in several if each.p_value is not None]
        p_values = dict(zip(map(id, tested), holm([each.p_value or 0.0 for each in tested]), strict=True))
        corrected += [replace(each, p_holm=p_values.get(id(each))) for each in several]
    return corrected

"""Scored rows analysed: lists of the worst, groups of what they have in common, labels that were confused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from petals_eval.errors import ConfigError
from petals_eval.metrics.groups import p_values_of_groups
from petals_eval.metrics.judged_rows import JudgedRows, judged, ordered
from petals_eval.metrics.scored_rows import Floats, ScoredRows
from petals_eval.runs.error_analysis import SURE, Confusion, ErrorAnalysis, ErrorRow, Group
from petals_eval.runs.rows import ComputedRows, KeyedRows
from petals_eval.swarm.peers.peer_text import short_peer
from petals_eval.tasks.requests import RowText
from petals_eval.text import listed, number_text

__all__ = ["Texts", "analyse", "chosen_name"]

MOST_CHOICES = 10  # places of choices without names that are shown as groups
QUARTILES = (0.25, 0.5, 0.75)

Texts = Callable[[Mapping[str, str]], Mapping[str, RowText]]
"""(hashes of rows by key) -> what a person reads of these rows; raises DataError where a row says something else."""


def analyse(
    kind: str,
    found: KeyedRows,
    computed: ComputedRows | None,
    *,
    task: str,
    adapter: str,
    label_names: Sequence[str] = (),
    failed: int = 0,
    limit: int = 5,
    texts: Texts | None = None,
    written: Mapping[str, str | None] | None = None,
    notes: Sequence[str] = (),
) -> ErrorAnalysis:
    """Analyse the scored rows of an adapter.

    computed: how they were computed; None: not known, and there are no groups by length, server and cut.
    limit: rows in each list. texts: what a person reads of rows. written: generated texts, by key.
    Raises DataError as `texts` does.
    """
    rows = judged(kind, found.rows)
    # A run that is under way may have scored more between the two looks.
    known = computed if computed is not None and len(computed.n_tokens) == len(found) else None
    parts = _Parts(kind, tuple(label_names), found, rows, known)
    is_judged = ~np.isnan(rows.loss)
    is_wrong = rows.is_wrong == 1
    has_wrong = not np.isnan(rows.is_wrong).all() or not len(rows)
    chosen = parts.lists(limit)
    shown = {position for positions in chosen.values() for position in positions}
    read = {} if texts is None else texts({found.keys[at]: found.hashes[at] for at in sorted(shown)})
    is_sure = rows.confidence >= SURE
    return ErrorAnalysis(
        task=task,
        adapter=adapter,
        kind=kind,
        label_names=tuple(label_names),
        rows=len(rows),
        judged=int(is_judged.sum()),
        wrong=int(is_wrong.sum()) if has_wrong else None,
        loss=_mean(rows.loss),
        failed=failed,
        sure=None if np.isnan(rows.confidence).all() else int((is_wrong & is_sure).sum()),
        confidence=(_mean(rows.confidence[rows.is_wrong == 0]), _mean(rows.confidence[is_wrong])),
        confusions=tuple(parts.confusions()),
        groups=parts.groups(),
        lists={
            name: tuple(parts.row(at, read, written or {}) for at in positions) for name, positions in chosen.items()
        },
        notes=tuple(notes),
    )


def chosen_name(wanted: str | None, names: Sequence[str], first_draws: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return which of the names in a journal is analysed, and what to say of the others.

    wanted: one of these, or an adapter with several draws of shots, of which `first_draws` has the first; None: the
    first name. Raises ConfigError for any other.
    """
    chosen = names[0] if wanted is None else first_draws.get(wanted, wanted)
    if chosen not in names:
        raise ConfigError(f"adapter: expected one of {listed(names)}; found {wanted!r}.")
    others = [name for name in names if name != chosen]
    return chosen, [f"the others are shown with --adapter: {listed(others)}"] if others and wanted is None else []


@dataclass(frozen=True, eq=False)
class _Parts:
    """The rows of one analysis, with all that its parts are made of."""

    kind: str
    label_names: tuple[str, ...]
    found: KeyedRows
    rows: JudgedRows
    computed: ComputedRows | None

    def lists(self, limit: int) -> dict[str, list[int]]:
        """Return the positions of the rows in each list that the kind has."""
        rows = self.rows
        every, is_wrong = np.ones(len(rows), dtype=np.bool_), rows.is_wrong == 1
        found: dict[str, Sequence[int]] = {}
        if self.kind in ("classification", "choice"):
            found["most confident"] = ordered(rows.confidence, is_wrong, highest=True, most=limit)
            if (self.found.rows.items > 2).any():  # of two answers the surest wrong one is the worst
                found["worst"] = ordered(rows.loss, is_wrong, highest=True, most=limit)
            found["closest"] = ordered(rows.margin, every, highest=False, most=limit)
        elif np.isnan(rows.is_wrong).all():
            found["worst"] = ordered(rows.loss, every, highest=True, most=limit)
        else:
            found["worst"] = ordered(rows.loss, is_wrong, highest=True, most=limit)
            if len(np.unique(rows.loss[is_wrong])) > 1:
                found["closest"] = ordered(rows.loss, is_wrong, highest=False, most=limit)
        return {name: list(positions) for name, positions in found.items() if positions}

    def confusions(self) -> list[Confusion]:
        """Return which label was taken for which, by how many rows."""
        if not self.label_names:
            return []
        rows = self.rows
        pairs: dict[tuple[int, int], list[int]] = {}
        for at in np.flatnonzero(rows.is_wrong == 1).tolist():
            pairs.setdefault((int(rows.labels[at]), int(rows.predictions[at])), []).append(at)
        return [
            Confusion(
                self.label_names[label],
                self.label_names[prediction],
                len(places),
                int((rows.labels == label).sum()),
                float(rows.confidence[places].mean()),
            )
            for (label, prediction), places in sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
        ]

    def groups(self) -> dict[str, tuple[Group, ...]]:
        """Return the groups by each thing that rows may have in common."""
        members: dict[str, dict[str, NDArray[np.bool_]]] = {"label": self._by_label()}
        if self.computed is not None:
            members["length"] = _by_range(self.computed.n_tokens.astype(np.float64), whole=True)
            members["server"] = self._by_server(self.computed)
            members["cut"] = _by_truth(self.computed.is_truncated, "cut", "whole")
        if "stopped_by_length" in self.found.rows.columns:
            members["end"] = _by_truth(self._column("stopped_by_length") == 1, "stopped by length", "ended by itself")
        return {name: self._tested(name, each) for name, each in members.items() if len(each) > (name != "server")}

    def row(self, at: int, texts: Mapping[str, RowText], written: Mapping[str, str | None]) -> ErrorRow:
        """Return the row at a position."""
        rows, computed, key = self.rows, self.computed, self.found.keys[at]
        wrong = rows.is_wrong[at]
        found = ErrorRow(
            key=key,
            label=self._named(rows.labels[at]),
            prediction=self._named(rows.predictions[at]),
            runner_up=self._named(rows.runner_up[at]),
            is_wrong=None if np.isnan(wrong) else bool(wrong),
            confidence=_known(rows.confidence[at]),
            of_label=_known(rows.of_label[at]),
            margin=_known(rows.margin[at]),
            loss=_known(rows.loss[at]),
            text=texts.get(key),
            written=written.get(key),
        )
        if computed is None:
            return found
        return replace(
            found,
            n_tokens=int(computed.n_tokens[at]),
            is_truncated=bool(computed.is_truncated[at]),
            servers=tuple(dict.fromkeys(server.peer_id for server, took in computed.servers.items() if took[at])),
        )

    def _by_label(self) -> dict[str, NDArray[np.bool_]]:
        labels = self.rows.labels
        if self.kind == "regression":
            return _by_range(labels)
        members = {name: labels == place for name, place in self._label_places().items()}
        return {name: inside for name, inside in members.items() if inside.any()}

    def _by_server(self, computed: ComputedRows) -> dict[str, NDArray[np.bool_]]:
        found: dict[str, NDArray[np.bool_]] = {}
        for server, took in computed.servers.items():
            name = f"{short_peer(server.peer_id)} {server.first}:{server.end}"
            found[name] = took | found.get(name, False)  # one that changed what else it says of itself
        return found

    def _label_places(self) -> dict[str, int]:
        """Return the labels by name; choices without names by their place, unless there are too many."""
        if self.label_names or np.isnan(self.rows.labels).all():
            return {name: place for place, name in enumerate(self.label_names)}
        places = int(np.nanmax(self.rows.labels)) + 1
        return {f"choice {place}": place for place in range(places)} if places <= MOST_CHOICES else {}

    def _tested(self, what: str, members: Mapping[str, NDArray[np.bool_]]) -> tuple[Group, ...]:
        rows = self.rows
        is_judged, has_wrong = ~np.isnan(rows.loss), not np.isnan(rows.is_wrong).all()
        p_values = p_values_of_groups(members, rows.is_wrong if has_wrong else rows.loss)
        places = self._label_places() if what == "label" and self.kind != "regression" else {}
        found = []
        for name, inside in members.items():
            known = inside & is_judged
            found.append(
                Group(
                    name=name,
                    rows=int(known.sum()),
                    wrong=int((rows.is_wrong[known] == 1).sum()) if has_wrong else None,
                    loss=_mean(rows.loss[known]),
                    error=_mean(rows.errors[known]),
                    predicted=int((is_judged & (rows.predictions == places[name])).sum()) if name in places else None,
                    p_value=p_values.get(name),
                )
            )
        return tuple(found)

    def _column(self, name: str) -> Floats:
        rows: ScoredRows = self.found.rows
        return rows.column(name)[rows.starts[:-1]]

    def _named(self, value: float) -> str | float | None:
        if np.isnan(value):
            return None
        if self.kind == "regression":
            return float(value)
        return self.label_names[int(value)] if self.label_names else int(value)


def _by_range(values: Floats, *, whole: bool = False) -> dict[str, NDArray[np.bool_]]:
    """Return groups of about a quarter of the known values each, by their range; equal values are in one."""
    known = values[~np.isnan(values)]
    if len(np.unique(known)) < 2:
        return {}
    edges = np.unique(np.quantile(known, QUARTILES, method="higher"))
    place = np.searchsorted(edges, values, side="right")
    found: dict[str, NDArray[np.bool_]] = {}
    for number in range(len(edges) + 1):
        inside = (place == number) & ~np.isnan(values)
        if inside.any():
            ends = [float(values[inside].min()), float(values[inside].max())]
            texts = [f"{end:.0f}" if whole else number_text(end, 2) for end in ends]
            found[" to ".join(dict.fromkeys(texts))] = inside
    return found


def _by_truth(inside: NDArray[np.bool_], name: str, other: str) -> dict[str, NDArray[np.bool_]]:
    return {name: inside, other: ~inside} if inside.any() and not inside.all() else {}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None

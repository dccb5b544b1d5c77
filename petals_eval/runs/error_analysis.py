"""Which rows went wrong, how sure the model was of them, and what they have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from petals_eval.metrics.judged_rows import LOSSES
from petals_eval.tasks.requests import RowText
from petals_eval.text import number_text, p_value_text

__all__ = ["SURE", "Confusion", "ErrorAnalysis", "ErrorRow", "Group"]

SCHEMA_VERSION = 1
SURE = 0.9  # a prediction of this probability or more is sure of itself
CHANCE = 0.05  # p-value from where on a group differs by no more than chance


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that have something in common, as far as it is known whether they are right.

    wrong: of them; None in kinds without right and wrong. loss: mean, as `LOSSES` has it. error: of a regression, the
    mean of prediction minus label. predicted: how often this label is the prediction, of all judged rows.
    p_value: of the group being like the other rows, corrected for the groups beside it; None where it is not tested.
    """

    name: str
    rows: int
    wrong: int | None = None
    loss: float | None = None
    error: float | None = None
    predicted: int | None = None
    p_value: float | None = None

    @property
    def share(self) -> float | None:
        """How many of its rows are wrong."""
        return None if self.wrong is None or not self.rows else self.wrong / self.rows

    @property
    def differs(self) -> bool:
        """Whether the group differs from the other rows by more than chance."""
        return self.p_value is not None and self.p_value < CHANCE

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__} | {"share": self.share}


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows of one label that were given another. of_label: rows of that label. confidence: mean, of the prediction."""

    label: str
    prediction: str
    rows: int
    of_label: int
    confidence: float

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A row that is shown. What the kind does not have, or is not known, is None.

    label, prediction, runner_up: names where there are any, else positions; numbers of a regression.
    is_wrong: None where nobody says what is right. confidence: probability of the prediction; of_label: of what is
    right; margin: by how much the prediction is above the runner-up. loss: as `LOSSES` has it.
    servers: peer ids of those that computed a part of it. text: what was asked, and what is right or was to be chosen
    from; None without the data. written: the generated text, where it was kept.
    """

    key: str
    label: str | float | None = None
    prediction: str | float | None = None
    runner_up: str | float | None = None
    is_wrong: bool | None = None
    confidence: float | None = None
    of_label: float | None = None
    margin: float | None = None
    loss: float | None = None
    n_tokens: int | None = None
    is_truncated: bool | None = None
    servers: tuple[str, ...] = ()
    text: RowText | None = None
    written: str | None = None

    def to_json(self) -> dict[str, object]:
        found = {name: getattr(self, name) for name in self.__slots__ if name not in ("servers", "text")}
        of_data = {} if self.text is None else {"text": self.text.text, "answers": list(self.text.answers)}
        return {**found, "servers": list(self.servers), **of_data}


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """What `petals_eval.errors_of` and `RunResult.errors` return: of one adapter, or of one draw of its shots.

    rows: that were scored. judged: of them, those of which it is known whether, or how much, they are wrong.
    wrong: of the judged ones; None in kinds without right and wrong. loss: mean of the judged ones.
    failed: rows that could not be computed; they are not wrong, and not here.
    sure: wrong rows whose prediction has a probability of `SURE` or more. confidence: mean of the right rows, and of
    the wrong ones; None where there are none, or the kind has none.
    confusions: by how many rows, the most first. groups: by what they have in common: "label", "length", "server",
    "cut" and "end" (of texts). lists: the rows that are "most confident" (of the wrong ones), "worst" and "closest", as
    far as a kind has them.
    notes: what a reader must know, such as why there are no texts.
    """

    task: str
    adapter: str
    kind: str
    label_names: tuple[str, ...]
    rows: int
    judged: int
    wrong: int | None
    loss: float | None
    failed: int
    sure: int | None
    confidence: tuple[float | None, float | None]
    confusions: tuple[Confusion, ...]
    groups: Mapping[str, tuple[Group, ...]]
    lists: Mapping[str, tuple[ErrorRow, ...]]
    notes: tuple[str, ...] = ()

    @property
    def loss_is(self) -> str:
        """What the loss of a row is."""
        return LOSSES[self.kind]

    @property
    def findings(self) -> tuple[str, ...]:
        """What stands out, a sentence each: the most common mistake, groups that differ by more than chance, and how
        sure the model is where it is wrong."""
        return tuple(_findings(self))

    def to_json(self) -> dict[str, object]:
        """Return what `petals-eval errors --json` prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "adapter": self.adapter,
            "kind": self.kind,
            "rows": self.rows,
            "judged": self.judged,
            "wrong": self.wrong,
            "failed": self.failed,
            "loss": self.loss,
            "loss_is": self.loss_is,
            "sure": self.sure,
            "confidence": {"right": self.confidence[0], "wrong": self.confidence[1]},
            "findings": list(self.findings),
            "confusions": [each.to_json() for each in self.confusions],
            "groups": {name: [group.to_json() for group in groups] for name, groups in self.groups.items()},
            "lists": {name: [row.to_json() for row in rows] for name, rows in self.lists.items()},
            "notes": list(self.notes),
        }


def _findings(found: ErrorAnalysis) -> list[str]:
    said = []
    if found.wrong and found.confusions and found.confusions[0].rows > 1:
        first = found.confusions[0]
        said.append(
            f"most common: {first.label} taken for {first.prediction}, {first.rows:,} of {found.wrong:,} wrong rows "
            f"({first.rows / first.of_label:.0%} of {first.label})"
        )
    for group in found.groups.get("label", ()):
        excess = (group.predicted or 0) - group.rows
        if group.predicted is not None and excess > max(5, found.judged / 20):
            said.append(
                f"{group.name} is answered too often: {group.predicted:,} times, and right for {group.rows:,} rows"
            )
    alike = []
    for what, groups in found.groups.items():
        worse = [(group, _rest(group, found)) for group in groups if group.differs]
        worse = [(group, rest) for group, rest in worse if rest is not None and _badness(group) > rest]
        said += [
            f"{what} {group.name}: {_badness_text(group, _badness(group))} against {_badness_text(group, rest)} of the "
            f"other rows (p {p_value_text(group.p_value)})"
            for group, rest in sorted(worse, key=lambda pair: -_badness(pair[0]))[:2]
        ]
        if not any(group.differs for group in groups) and any(group.p_value is not None for group in groups):
            alike.append(what)
    if alike:
        said.append(f"no more than chance: the differences by {', '.join(alike)}")
    servers = found.groups.get("server", ())
    if servers and all(group.p_value is None for group in servers):
        said.append("every row went through the same servers")
    if found.wrong and found.sure is not None:
        said.append(
            f"sure and wrong: {found.sure:,} of {found.wrong:,} wrong answers have a probability of {SURE:g} or more"
        )
    errors = [group.error for group in found.groups.get("label", ()) if group.error is not None]
    if found.kind == "regression" and len(errors) > 1:
        said.append(
            f"by label, from the lowest to the highest quarter, predictions are off by "
            f"{', '.join(f'{error:+.3g}' for error in errors)} on average"
        )
    return said


def _badness(group: Group) -> float:
    return (group.loss if group.share is None else group.share) or 0.0


def _rest(group: Group, found: ErrorAnalysis) -> float | None:
    """Return the same of the rows outside a group."""
    others = found.judged - group.rows
    if others <= 0:
        return None
    if group.wrong is not None and found.wrong is not None:
        return (found.wrong - group.wrong) / others
    return ((found.loss or 0.0) * found.judged - (group.loss or 0.0) * group.rows) / others


def _badness_text(group: Group, value: float | None) -> str:
    value = value or 0.0
    return f"{value:.1%} wrong" if group.share is not None else f"a loss of {number_text(value, 3)}"

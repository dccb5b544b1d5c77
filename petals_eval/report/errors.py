"""An analysis of errors on the terminal, or as plain text where there is none."""

from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from petals_eval.report.tables import NAME_WIDTH, fitting_table
from petals_eval.runs.error_analysis import ErrorAnalysis, ErrorRow, Group
from petals_eval.text import number_text, p_value_text, plural, printable

__all__ = ["print_errors"]

TEXT_LINES = 3  # of a row's text
MOST_CHARACTERS = 2000  # of a text, before it is cut to lines
_INDENT = 4

_TITLES = {
    "label": "by label",
    "length": "by length, in tokens",
    "server": "by server",
    "cut": "by cut",
    "end": "by end",
}
_LISTS = {
    "most confident": "the most confident wrong answers",
    "worst": "the worst",
    "closest": "the closest",
}


def print_errors(found: ErrorAnalysis, console: Console) -> None:
    """Print what stands out, then tables of what wrong rows have in common, then rows with their texts.

    console: of `console_for`; everything printed is plain text to it, never markup.
    """
    for block in _blocks(found, console):
        for line in block:
            console.print(line, soft_wrap=True)
        console.print()


def _blocks(found: ErrorAnalysis, console: Console) -> Iterator[list[Text]]:
    yield [
        *_sentence(_headline(found), console, 0, style="bold"),
        *(line for said in found.findings for line in _sentence(f"- {said}", console, 2)),
    ]
    if found.confusions:
        most = max(len(rows) for rows in found.lists.values()) if found.lists else len(found.confusions)
        rows = [
            [_name(each.label), _name(each.prediction), f"{each.rows:,}", f"{each.rows / each.of_label:.1%}",
             f"{each.confidence:.2f}"]
            for each in found.confusions[:most]
        ]  # fmt: skip
        more = len(found.confusions) - len(rows)
        heads = ["label", "taken for", "rows", "of label", "confidence"]
        yield [
            *fitting_table(heads, rows, console.width),
            *([Text(f"  and {plural(more, 'other pair')}")] if more else []),
        ]
    for name, groups in found.groups.items():
        if name != "server" or any(group.p_value is not None for group in groups):
            yield _table(_TITLES[name], groups, console.width)
    for name, listed in found.lists.items():
        title = _sentence(_title(found, name), console, 0, style="bold")
        yield [*title, *(line for row in listed for line in _row(found, row, console))]
    if any(group.differs for groups in found.groups.values() for group in groups):
        yield [*_sentence(f"* {_TESTED[found.wrong is None]}", console, 0)]
    if found.notes:
        yield [line for note in found.notes for line in _sentence(f"note: {note}", console, 0)]


_TESTED = {
    False: "differs from the other rows by more than chance (p below 0.05: Fisher's exact test, Holm's correction)",
    True: "differs from the other rows by more than chance (p below 0.05: Mann and Whitney's test, Holm's correction)",
}


def _headline(found: ErrorAnalysis) -> str:
    of = f"{printable(found.task)}, {printable(found.adapter)}: "
    if found.wrong is not None:
        share = found.wrong / found.judged if found.judged else 0.0
        said = f"{found.wrong:,} of {plural(found.judged, 'row')} wrong ({share:.1%})"
        right, wrong = (("-" if each is None else f"{each:.2f}") for each in found.confidence)
        if found.sure is not None:
            said += f"; confidence {right} where right, {wrong} where wrong"
    else:
        loss = "-" if found.loss is None else number_text(found.loss, 3)
        said = f"{plural(found.judged, 'row')}, {found.loss_is} {loss} on average"
    without = found.rows - found.judged
    more = [f"{plural(without, 'row')} without anything right to compare"] if without else []
    more += [f"{found.failed:,} failed: failures.jsonl says why"] if found.failed else []
    return of + "; ".join([said, *more])


def _table(title: str, groups: Sequence[Group], width: int) -> list[Text]:
    """Return a table of groups, with the columns that these have."""
    cells: dict[str, list[str]] = {title: [_name(group.name) for group in groups]}
    cells["rows"] = [f"{group.rows:,}" for group in groups]
    if any(group.wrong is not None for group in groups):
        cells["wrong"] = ["-" if group.wrong is None else f"{group.wrong:,}" for group in groups]
        cells["share"] = [
            "-" if group.share is None else f"{group.share:.1%}{' *' if group.differs else ''}" for group in groups
        ]
    if any(group.predicted is not None for group in groups):
        cells["predicted"] = ["-" if group.predicted is None else f"{group.predicted:,}" for group in groups]
    if any(group.error is not None for group in groups):
        cells["mean error"] = ["-" if group.error is None else _signed(group.error) for group in groups]
    star = ["" if "wrong" in cells or not group.differs else " *" for group in groups]
    cells["loss"] = [
        ("-" if group.loss is None else number_text(group.loss, 3)) + mark
        for group, mark in zip(groups, star, strict=True)
    ]
    if any(group.p_value is not None for group in groups):
        cells["p"] = [p_value_text(group.p_value) for group in groups]
    return fitting_table(list(cells), list(zip(*cells.values(), strict=True)), width)


def _title(found: ErrorAnalysis, name: str) -> str:
    if name == "worst" and found.kind in ("classification", "choice"):
        return "the worst: what is right was the least likely"
    if name == "worst" and found.kind == "generation":
        return "the worst texts" if found.wrong is not None else "texts"
    if name == "closest" and found.kind in ("classification", "choice"):
        return "the closest: two answers were about as likely"
    if name == "closest":
        return "the closest: wrong by little"
    return _LISTS[name] + (f" ({found.loss_is})" if name == "worst" else "")


def _row(found: ErrorAnalysis, row: ErrorRow, console: Console) -> Iterator[Text]:
    """Yield the lines of a row: what was predicted, and below it what was read."""
    parts = [f"row {printable(row.key)}", *_predicted(found, row)]
    if row.n_tokens is not None:
        parts.append(f"{plural(row.n_tokens, 'token')}{', cut' if row.is_truncated else ''}")
    yield from _sentence(" · ".join(parts), console, 2)
    text = row.text
    if text is not None:
        yield from _wrapped(text.text, console, _INDENT)
        yield from _answers(found, row, text.answers, console)
    if row.written is not None:
        yield from _wrapped(f"wrote: {row.written!r}", console, _INDENT)


def _predicted(found: ErrorAnalysis, row: ErrorRow) -> Iterator[str]:
    if found.kind in ("classification", "choice"):
        prediction, label, runner_up = (_answer(found, each) for each in (row.prediction, row.label, row.runner_up))
        if row.is_wrong:
            yield f"{label} {_share(row.of_label)}, taken for {prediction} {_share(row.confidence)}"
        else:
            right = "right" if row.is_wrong is False else "no label"
            yield f"{right}: {prediction} {_share(row.confidence)}, {runner_up} {_share(_below(row))}"
    elif found.kind == "regression":
        yield f"label {_number(row.label)}, predicted {_number(row.prediction)}"
    elif found.kind == "continuation":
        yield f"p of the target {'-' if row.of_label is None else number_text(row.of_label, 3)}"
    elif row.loss is not None:
        yield (
            f"{number_text(row.loss, 3)} {found.loss_is}" if found.kind == "perplexity" else f"score {1 - row.loss:.2f}"
        )


def _below(row: ErrorRow) -> float | None:
    return None if row.confidence is None or row.margin is None else row.confidence - row.margin


def _answers(found: ErrorAnalysis, row: ErrorRow, answers: Sequence[str], console: Console) -> Iterator[Text]:
    """Yield the choices of a row with what was taken and what is right, or the texts that are right."""
    if found.kind == "choice":
        marks = _marks(found, row, len(answers))
        for place, answer in enumerate(answers):
            if place in marks:
                yield from _wrapped(f"{marks[place]}: {answer}", console, _INDENT)
    elif answers:
        what = "target" if found.kind == "continuation" else "right"
        yield from _wrapped(f"{what}: {' | '.join(map(repr, answers))}", console, _INDENT)


def _marks(found: ErrorAnalysis, row: ErrorRow, count: int) -> Mapping[int, str]:
    def place(answer: str | float | None) -> int | None:
        if isinstance(answer, str):
            return found.label_names.index(answer)
        return None if answer is None or not 0 <= answer < count else int(answer)

    marks: dict[int, str] = {}
    for answer, what in ((row.label, "right"), (row.prediction, "taken"), (row.runner_up, "next")):
        at = place(answer)
        if at is not None and (what != "next" or not row.is_wrong):
            marks[at] = f"{marks[at]} and {what}" if at in marks else what
    return marks


def _answer(found: ErrorAnalysis, answer: str | float | None) -> str:
    if answer is None:
        return "nothing"
    return _name(answer) if isinstance(answer, str) else f"choice {answer:.0f}"


def _name(name: str) -> str:
    return printable(name, longest=NAME_WIDTH)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(value: object) -> str:
    return number_text(value, 3) if isinstance(value, float) else "-"


def _signed(value: float) -> str:
    text = number_text(value, 3)
    return text if text.startswith("-") else f"+{text}"


def _wrapped(text: str, console: Console, indent: int) -> list[Text]:
    """Return the first lines of a text that was read, in the console's width; a longer one says that it goes on."""
    lines = _lines(text, console, indent)
    if len(lines) > TEXT_LINES:
        last = lines[TEXT_LINES - 1]
        room = min(cell_len(last), max(20, console.width - indent) - 1)
        lines = [*lines[: TEXT_LINES - 1], f"{set_cell_size(last, room)}…"]
    return [Text(" " * indent + line) for line in lines]


def _sentence(text: str, console: Console, indent: int, *, style: str = "") -> list[Text]:
    """Return a sentence in the console's width; its next lines stand two further in."""
    lines = _lines(text, console, indent + 2)
    return [Text(" " * (indent + 2 * bool(number)) + line, style=style) for number, line in enumerate(lines)]


def _lines(text: str, console: Console, indent: int) -> list[str]:
    safe = printable(text, longest=MOST_CHARACTERS, keep_lines=True)
    return [line.plain.rstrip() for line in Text(safe).wrap(console, max(20, console.width - indent))]

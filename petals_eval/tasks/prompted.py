"""What the kinds of task that speak to a language model have in common: from a row to the text before its answer."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from petals_eval.data.rows import Row, Rows, row_hash
from petals_eval.data.source import DataSource, FileFormat, FileReading
from petals_eval.errors import DataError, PetalsEvalError, TaskError
from petals_eval.tasks.chat import Message, chat_text, check_chat_template, joined
from petals_eval.tasks.labels import Unlabelled
from petals_eval.tasks.shots import Draw, Shots
from petals_eval.tasks.tokens import Bos
from petals_eval.validation import explain

__all__ = ["PromptedTask", "Prompting", "Turn"]

_NOT_ANSWERING = frozenset({"name", "description", "metrics", "data", "formats", "unlabelled", "cluster_column"})
"""Keys that change no answer."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A row as one exchange. question: the text before the answer. answer: what follows it, or None where it is asked.

    delimiter: between the two where they are one text, and not turns of a chat.
    """

    question: str
    answer: str | None
    delimiter: str = " "


def _count_alone(value: Any) -> Any:
    """Take a number for so many shots."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return {"count": value} if is_number or (isinstance(value, str) and value.strip().isdecimal()) else value


class Prompting(BaseModel):
    """What stands around the question of a row, and how rows are prepared. A wrong definition raises TaskError.

    instruction: stands in front of everything, exactly as written; it brings its own line ends. system: stands before
        the instruction; if neither has a blank where they meet, the separator is between them.
    shots: rows that are shown with their answers before the question; a number is so many of the split train.
    separator: after each shot.
    chat: everything as a conversation in the tokenizer's chat template: the instruction as its system message, each
        shot as two turns, the question as the last one, and the answer begins the assistant's turn. Neither
        separators nor the delimiters before answers stand in it.
    prepare: "module:function" of a mapping to a mapping, applied to each row before anything else reads it, those of
        shots as well (`petals_eval.tasks.row_code`).

    The text is lm-evaluation-harness 0.4.13's (`fewshot_context` in its api/task.py), with `instruction` as its
    description, `separator` as its fewshot_delimiter and shots as turns as its fewshot_as_multiturn. One thing differs
    on purpose: a chat template that takes no system message is an error, and the message is not dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    without_shots: ClassVar[str | None] = None
    """Of a kind around whose texts nothing can stand: why, after "a task of kind ..."."""

    instruction: str = ""
    system: str = ""
    separator: str = "\n\n"
    shots: Annotated[Shots | None, BeforeValidator(_count_alone)] = None
    chat: bool = False
    prepare: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

    _draw: Draw | None = PrivateAttr(default=None)
    _pool: Rows | None = PrivateAttr(default=None)
    _folder: str | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_wrong(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            task = handler(values)
        except ValidationError as error:
            raise TaskError(f"this task cannot be used:\n{explain(error, cls)}") from None
        except DataError as error:
            raise TaskError(f"this task's data: {error}") from None
        if problem := task.prompt_problem() or task._disagreement():
            raise TaskError(f"this task cannot be used:\n  {problem}")
        return task

    def _disagreement(self) -> str | None:
        """Return what of a kind's own definition does not fit together, or None."""
        return None

    def prompt_problem(self) -> str | None:
        """Return why this kind cannot have what is asked for here, or None."""
        kind = getattr(self, "kind", "")
        if self.without_shots is not None and self.is_prompted:
            asked = {"shots": self.wants_shots, "chat": self.chat, "instruction": self.instruction}
            what = next((name for name, wanted in asked.items() if wanted), "system")
            return f"{what}: a task of kind {kind} {self.without_shots}. Leave {what} out"
        if self.wants_shots and self.shots is not None and self.shots.balanced and not self.label_names_of_shots():
            return "shots.balanced: needs labels that all rows share. Leave it out"
        return None

    def label_names_of_shots(self) -> Sequence[str]:
        """Return the labels by which shots may be balanced; empty where rows share none."""
        found: Sequence[str] = getattr(self, "label_names", ())
        return found

    @property
    def wants_shots(self) -> bool:
        """Whether shots stand before the questions."""
        return self.shots is not None and self.shots.number > 0

    @property
    def is_prompted(self) -> bool:
        """Whether anything stands around a question."""
        return bool(self.wants_shots or self.chat or self.instruction or self.system)

    def turn(self, row: Row, where: str) -> Turn:
        """Return a row with its right answer, as a shot shows it. Raises DataError, with `where` in front.

        `shot_rows` says what the row's source knows of its columns. Of a kind without shots this is never asked.
        """
        raise PetalsEvalError(f"task {self.name} {self.without_shots}: it shows no shots.")  # type: ignore[attr-defined]

    @property
    def shot_rows(self) -> Rows | None:
        """The rows that shots are drawn from, with the names of their classes."""
        return self._pool

    def drawing_from(self, pool: Rows) -> Self:
        """Return this task with the rows that its shots are drawn from."""
        copy = self.model_copy()
        copy._pool = pool
        return copy

    def showing(self, draw: Draw) -> Self:
        """Return this task with the shots of a draw."""
        copy = self.drawing_from(draw.pool)
        copy._draw = draw
        return copy

    def answer_delimiter(self, delimiter: str) -> str:
        """Return what stands between a question and its answer: nothing in a chat, where the turn has begun."""
        return "" if self.chat else delimiter

    def contexts(self, questions: Sequence[str], row: Row, tokenizer: Any) -> list[str]:
        """Return the whole text before the answer for each of the questions of a row.

        Raises TaskError where shots were not drawn, DataError for a row that cannot be one, ModelError where there is
        no chat template, and ExampleError where it fails on this row.
        """
        if not self.is_prompted:
            return list(questions)
        turns = self._turns(row)
        if self.chat:
            messages = self._messages(turns)
            return [chat_text(tokenizer, [*messages, _user(question)]) for question in questions]
        shown = "".join(f"{turn.question}{turn.delimiter}{turn.answer}{self.separator}" for turn in turns)
        front = joined(self.system, self.instruction, self.separator) + shown
        return [front + question for question in questions]

    def check_chat(self, tokenizer: Any) -> None:
        """Raise ModelError where this tokenizer's chat template cannot be used for this task, whatever the row."""
        if self.chat:
            turns = [Turn("question", "answer")] if self.wants_shots else []
            check_chat_template(tokenizer, [*self._messages(turns), _user("question")])

    def prompt_fingerprint(self) -> dict[str, object]:
        """Return what of this changes an answer, where it is not as it is by default."""
        found: dict[str, object] = {}
        for name in ("instruction", "system", "chat", "prepare"):
            if value := getattr(self, name):
                found[name] = value
        if self.wants_shots and self.shots is not None:
            found |= {"shots": self.shots.to_json(), "separator": self.separator}
        elif joined(self.system, self.instruction, self.separator) != self.system + self.instruction:
            found["separator"] = self.separator
        return found

    def _turns(self, row: Row) -> list[Turn]:
        if not self.wants_shots:
            return []
        if self._draw is None:
            raise TaskError(
                f"task {getattr(self, 'name', '')}: its shots have not been drawn. petals_eval.evaluate draws them; "
                "elsewhere, give it those of petals_eval.tasks.shots.draw_shots with showing(draw)."
            )
        return [self.shown_turn(shot) for shot in self._draw.rows_for(row)]

    def shown_turn(self, shot: Row, *, may_lack_answer: bool = False) -> Turn:
        """Return the exchange of a shot. Raises DataError for a row that has no answer, unless it may lack one."""
        pool = self.shot_rows
        where = f"a shot, row {shot.index}" if pool is None else f"a shot, {pool.where(shot)}"
        try:
            turn = self.turn(shot, where)
        except KeyError as error:
            raise DataError(
                f"{where} has no column {error}, which task {getattr(self, 'name', '')} reads. Columns found: "
                f"{', '.join(shot.columns)}."
            ) from error
        if not turn.answer and not may_lack_answer:
            raise DataError(f"{where} has no answer to show. Draw the shots from rows that have one.")
        return turn

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        front = joined(self.system, self.instruction, self.separator)
        messages = [{"role": "system", "content": front}] if front else []
        for turn in turns:
            messages += [_user(turn.question), {"role": "assistant", "content": turn.answer or ""}]
        return messages


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


class PromptedTask(Prompting, ABC):
    """A task whose rows become texts that a language model goes on from.

    name, description: for people.
    metrics, data, formats: as a classification has them.
    bos: whether a beginning-of-text token stands in front.
    unlabelled: what becomes of rows that do not say what is right, for kinds that have labels
        (`petals_eval.tasks.labels.no_label`).
    cluster_column: as a classification has it.
    """

    name: str = Field(min_length=1)
    description: str = ""
    metrics: tuple[str, ...] = Field(min_length=1)
    data: DataSource | None = None
    formats: dict[FileFormat, FileReading] = Field(default_factory=dict)
    bos: Bos = "auto"
    unlabelled: Unlabelled = "error"
    cluster_column: str | None = Field(default=None, min_length=1)

    without_labels: ClassVar[str | None] = None
    """Of a kind none of whose rows says what is right: what it has instead, after "a task of kind ..."."""

    _context: int | None = PrivateAttr(default=None)

    def prompt_problem(self) -> str | None:
        """Return why this kind cannot have what is asked for here, rows without labels among it, or None."""
        if self.without_labels is not None and self.unlabelled == "predict":
            kind = getattr(self, "kind", "")
            return f"unlabelled: a task of kind {kind} {self.without_labels}. Leave unlabelled out"
        return super().prompt_problem()

    @property
    def head(self) -> Literal["class", "lm"]:
        return "lm"

    @property
    @abstractmethod
    def columns_read(self) -> tuple[str, ...]:
        """The columns that are read of every row, each once."""

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """Those of them without which no row can be asked."""
        return self.columns_read

    @abstractmethod
    def check_row(self, rows: Rows, row: Row) -> None:
        """Raise DataError, which names the row, what was found there and what was expected, for one of no use."""

    @property
    def read_as(self) -> Hashable:
        """What `check_row` goes by: rows that passed for it are not looked at again."""
        return type(self), self.model_dump_json(exclude={"name", "description", "data", "formats", "cluster_column"})

    def check(self, rows: Rows) -> None:
        """Look at the columns and at every row: a mistake in the last one should not end a run of hours.

        Raises DataError as `check_row` does. Rows that passed, and parts of them, are not looked at again.
        """
        if self.read_as in rows.passed:
            return
        rows.check_columns(self.columns_needed, self.name)
        for row in rows:
            self.check_row(rows, row)
        rows.passed.add(self.read_as)

    def row_hash(self, row: Row) -> str:
        """Return the hash of what is read of a row."""
        return row_hash(row.columns, [column for column in self.columns_read if column in row.columns])

    def fingerprint(self) -> dict[str, object]:
        """Return all that changes an answer: neither the name nor the metrics, and not where the data lies."""
        own = self.model_dump(mode="json", by_alias=True, exclude={*_NOT_ANSWERING, *Prompting.model_fields})
        return {"head": self.head, **own, **self.prompt_fingerprint()}

    def bound_to(self, context: int | None) -> Self:
        """Return the task for a model that reads so many tokens of text, tuned prompts not among them.

        context: None is any number. Raises TaskError where the definition asks for more.
        """
        bound = self.model_copy()
        bound._context = context
        return bound

"""What choices and continuations have in common: answers whose likelihood is asked, each after a text."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from petals_eval.data.rows import Row, Rows
from petals_eval.errors import ExampleError, NotFiniteError, PetalsEvalError, RequestTooLargeError
from petals_eval.tasks.prompted import PromptedTask
from petals_eval.tasks.requests import Example, Generated, Request, RowText, as_float64
from petals_eval.tasks.template import Template
from petals_eval.tasks.tokens import CHUNK_ROWS, EncodedPair, encode_pairs

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Asked", "LikelihoodTask", "Place", "Scored", "constant_text", "requests_together", "template_of"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A row as it is asked.

    questions: the text before the answers: one for all of them, or one for each.
    answers: the texts whose likelihood is asked, without the delimiter.
    counted: for each answer the text whose characters and bytes count: the answer itself, or what tells it apart.
    label: the position of the right answer; None where nobody says, or there is but one answer.
    error: why the row can only be a failure.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    counted: tuple[str, ...]
    label: int | None = None
    error: ExampleError | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the likelihoods of an answer's tokens stand: from `start` to `stop`, exclusive, among a part's targets."""

    part: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Scored:
    """What `predict` needs of an example (`Example.reference`).

    places: of each answer, in their order. without_context: of each answer with nothing before it, where that is asked.
    counted: the characters and the bytes of each answer.
    """

    places: tuple[Place, ...]
    without_context: tuple[Place, ...]
    counted: tuple[tuple[int, int], ...]


class LikelihoodTask(PromptedTask):
    """A task that asks how likely texts are to follow others.

    delimiter: between a question and an answer.
    max_length: tokens at most of a text and an answer after it, the last one left out, which the model need not read;
        None: as many as the model reads.
    too_long: a row that has more is a failure (fail), or the first tokens of the text go (cut), the one that begins it
        among them, as in lm-evaluation-harness.
    """

    delimiter: str = " "
    max_length: int | None = Field(default=None, ge=1)
    too_long: Literal["fail", "cut"] = "fail"

    asks_greedy: ClassVar[bool] = False

    @property
    def asks_without_context(self) -> bool:
        """Whether the likelihood of each answer with nothing before it is asked, too."""
        return False

    @abstractmethod
    def asked(self, rows: Rows, row: Row) -> Asked:
        """Return one of `rows` as it is asked. Raises DataError, which names the row, where it cannot be."""

    def pairs(self, rows: Rows, row: Row, tokenizer: Any) -> list[tuple[str, str]]:
        """Return what is asked of one of `rows` as text: pairs (all that stands before, what is scored after it).

        One for each answer, and then one for each without context where that is asked. Raises DataError, ExampleError.
        """
        return self._pairs(self.asked(rows, row), row, tokenizer)

    def check_row(self, rows: Rows, row: Row) -> None:
        self.asked(rows, row)

    def row_text(self, rows: Rows, row: Row) -> RowText:
        """Return what a person reads of one of `rows`. Raises DataError."""
        asked = self.asked(rows, row)
        # Where the texts before the answer differ, they are what is chosen among.
        text = asked.questions[0] if len(asked.questions) == 1 else asked.answers[0]
        return RowText(text, asked.counted, self.row_hash(row))

    def examples(self, rows: Rows, tokenizer: Any) -> Iterator[Example]:
        """Yield examples in the order of `rows`, tokenised a few hundred at a time as they are asked for.

        All of them are checked before the first one comes out. A row that only the tokenizer shows to be impossible is
        an example with an error. Raises DataError as `check` does, ModelError for a tokenizer that lacks a token.
        """
        self.check(rows)
        source = iter(rows)
        while chunk := list(islice(source, CHUNK_ROWS)):
            every = [self.asked(rows, row) for row in chunk]
            texts = [self._pairs_or_error(asked, row, tokenizer) for asked, row in zip(every, chunk, strict=True)]
            flat = [pair for pairs in texts if not isinstance(pairs, ExampleError) for pair in pairs]
            encoded = iter(encode_pairs(tokenizer, flat, self.bos))
            for row, asked, pairs in zip(chunk, every, texts, strict=True):
                if isinstance(pairs, ExampleError):
                    yield self._failing(row, asked, pairs)
                else:
                    yield self._example(row, asked, pairs, [next(encoded) for _ in pairs])

    def _pairs(self, asked: Asked, row: Row, tokenizer: Any) -> list[tuple[str, str]]:
        contexts = self.contexts(asked.questions, row, tokenizer)
        before = contexts * len(asked.answers) if len(contexts) == 1 else contexts
        delimiter = self.answer_delimiter(self.delimiter)
        after = [delimiter + answer for answer in asked.answers]
        alone = [("", answer) for answer in after] if self.asks_without_context else []
        return [*zip(before, after, strict=True), *alone]

    def _pairs_or_error(self, asked: Asked, row: Row, tokenizer: Any) -> list[tuple[str, str]] | ExampleError:
        try:
            return asked.error or self._pairs(asked, row, tokenizer)
        except ExampleError as error:
            return error

    def _example(
        self,
        row: Row,
        asked: Asked,
        pairs: Sequence[tuple[str, str]],
        encoded: Sequence[EncodedPair | ExampleError],
    ) -> Example:
        tokens = []
        for pair in encoded:
            if isinstance(pair, ExampleError):
                return self._failing(row, asked, pair)
            tokens.append(pair)
        try:
            inputs = [self._input(pair) for pair in tokens]
        except ExampleError as error:
            return self._failing(row, asked, error)
        key, count = str(row.index), len(asked.answers)
        requests, places = requests_together(
            key, inputs, [pair.answer for pair in tokens], asks_greedy=self.asks_greedy
        )
        sizes = tuple((len(text), len(text.encode("utf-8", "surrogatepass"))) for text in asked.counted)
        return Example(
            key=key,
            label=asked.label,
            requests=requests,
            n_tokens=sum(len(request.input_ids) for request in requests),
            truncated=any(
                len(pair.context) + len(pair.answer) - 1 > len(ids) for pair, ids in zip(tokens, inputs, strict=True)
            ),
            text=_shown(pairs[:count]),
            row_hash=self.row_hash(row),
            reference=Scored(places[:count], places[count:], sizes),
        )

    def _failing(self, row: Row, asked: Asked, error: ExampleError) -> Example:
        text = "\n".join(asked.questions)
        return Example(str(row.index), asked.label, (), 0, False, text, self.row_hash(row), error=error)

    def _input(self, pair: EncodedPair) -> tuple[int, ...]:
        """Return what the model reads for an answer. Raises RequestTooLargeError where it has no room."""
        whole = (pair.context + pair.answer)[:-1]
        limits = [limit for limit in (self.max_length, self._context) if limit is not None]
        if not limits or len(whole) <= min(limits):
            return whole
        limit = min(limits)
        if self.too_long == "cut" and len(pair.answer) <= limit:
            return whole[-limit:]
        whose = "the task's max_length" if self.max_length == limit else "what the model reads beside its prompts"
        cut = "" if self.too_long == "cut" else ", or let too_long: cut drop the first tokens of the text"
        raise RequestTooLargeError(
            f"a text of {len(pair.context)} tokens and an answer of {len(pair.answer)} make {len(whole)} to be read; "
            f"expected {limit} at most, which is {whose}. Shorten the row{cut}."
        )

    def _likelihoods(self, example: Example, answers: "Sequence[torch.Tensor | Generated]") -> "list[np.ndarray]":
        """Return the numbers of each request of an example, finite ones. Raises NotFiniteError, PetalsEvalError."""
        import numpy as np

        numbers = [as_float64(answer) for answer in answers]
        if len(numbers) != len(example.requests):
            raise PetalsEvalError(
                f"example {example.key}: expected {len(example.requests)} answers, found {len(numbers)}."
            )
        if not all(np.isfinite(each).all() for each in numbers):
            raise NotFiniteError(
                f"example {example.key}: expected finite likelihoods, found {[each.tolist() for each in numbers]}. The "
                "local norm or head overflowed, or its weights are damaged: try --dtype float32, and check the model."
            )
        return numbers


@lru_cache(maxsize=256)
def template_of(text: str) -> Template:
    """Return a template that was found to be well-formed; it may be constant."""
    return Template.parse(text, may_be_constant=True)


def constant_text(text: object) -> str | None:
    """Return what a template without columns always gives; None for any other, and for what is none."""
    if not isinstance(text, str):
        return None
    try:
        template = template_of(text)
    except ValueError:
        return None
    return None if template.segments else template.tail


def requests_together(
    key: str, inputs: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]], *, asks_greedy: bool
) -> tuple[tuple[Request, ...], tuple[Place, ...]]:
    """Return the fewest requests for all of the answers, and where each of these stands.

    inputs: what the model reads for each answer, without its last token. What one reads that begins another's input is
    read there, too: a causal model's answer at a position knows nothing of what follows.
    """
    # In this order an input that begins others stands right before one of these.
    ordered = sorted(range(len(inputs)), key=lambda index: inputs[index])
    carrier = list(range(len(inputs)))
    for index, longer in reversed(list(pairwise(ordered))):
        if inputs[carrier[longer]][: len(inputs[index])] == inputs[index]:
            carrier[index] = carrier[longer]
    parts = {index: part for part, index in enumerate(dict.fromkeys(carrier))}
    targets: list[list[tuple[int, int]]] = [[] for _ in parts]
    places = []
    for index, answer in enumerate(answers):
        part = parts[carrier[index]]
        first = len(inputs[index]) - len(answer)
        places.append(Place(part, len(targets[part]), len(targets[part]) + len(answer)))
        targets[part] += [(first + at, token) for at, token in enumerate(answer)]
    requests = tuple(
        Request(key, part, inputs[index], tuple(targets[part]), asks_greedy) for index, part in parts.items()
    )
    return requests, tuple(places)


def _shown(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the texts of an example for a person: in brackets what is scored."""
    if len({context for context, _ in pairs}) == 1:
        return f"{pairs[0][0]}[{'|'.join(answer for _, answer in pairs)}]"
    return "\n".join(f"{context}[{answer}]" for context, answer in pairs)

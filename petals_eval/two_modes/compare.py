"""One input answered again and again, in training and in eval mode, with gradients and without."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from petals_eval.errors import ConfigError, ModelError
from petals_eval.two_modes.behaviours import Behaviour, behaviours_of

__all__ = ["Answer", "Forgotten", "Gradients", "Modes", "RunningStatistics", "modes"]

SCHEMA_VERSION = 1
_FORGOTTEN_PASSES = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to the same input.

    predicted: position of the highest logit. top_logit: its value. from_first, from_mean: mean absolute difference of
    all logits from those of the first answer, and from the mean of all answers.
    """

    predicted: int
    top_logit: float
    from_first: float
    from_mean: float


@dataclass(frozen=True, slots=True)
class RunningStatistics:
    """How far one forward pass in training mode moved the running statistics of a batch norm: the largest absolute
    change of its running mean and variance. They were put back."""

    path: str
    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class Gradients:
    """The same answer with gradients and without, in eval mode.

    is_equal: to the last bit. largest: absolute difference of a logit. bytes_kept: tensors that a pass with gradients
    keeps for the backward pass, parameters not among them, in bytes; one without keeps none.
    requires_grad: modules whose output requires grad although no gradient was asked for.
    """

    is_equal: bool
    largest: float
    bytes_kept: int
    requires_grad: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What a metric over an evaluation set would have been, had `eval()` been forgotten.

    in_eval: its value in eval mode. in_training: of each pass in training mode.
    """

    in_eval: float
    in_training: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Modes:
    """What `modes` returns.

    behaviours: modules that behave otherwise in training. was_training: paths of modules that were in training mode.
    training, evaluation: answers in each mode. differing: in eval mode, the first module whose output was another one
    the second time; None where all answers are equal bit for bit.
    statistics: of batch norms. gradients: with and without. forgotten: None without an evaluation set.
    half_precision: trainable parameters that are kept in half precision, in which small steps are lost.
    """

    behaviours: tuple[Behaviour, ...]
    was_training: tuple[str, ...]
    training: tuple[Answer, ...]
    evaluation: tuple[Answer, ...]
    differing: str | None
    statistics: tuple[RunningStatistics, ...]
    gradients: Gradients
    forgotten: Forgotten | None = None
    half_precision: tuple[str, ...] = ()

    @property
    def is_deterministic(self) -> bool:
        """Whether all answers in eval mode are equal bit for bit, and none requires grad."""
        return self.differing is None and not self.gradients.requires_grad

    def to_json(self) -> dict[str, object]:
        """Return what `petals-eval modes --json` prints."""
        return {"schema_version": SCHEMA_VERSION, "is_deterministic": self.is_deterministic, **asdict(self)}


def modes(
    model: nn.Module,
    inputs: Any,
    *,
    answers: int = 5,
    seed: int = 0,
    batches: Iterable[tuple[Any, torch.Tensor]] | None = None,
) -> Modes:
    """Answer one input again and again in both modes, and say what training mode changes.

    model: any module; a live Petals model, too. Its modes, buffers and torch's random state are as they were when this
        returns or raises; nothing is trained.
    inputs: what the model is called with: a tensor, a sequence of arguments or a mapping of keywords.
    answers: how many in each mode, from 2 on. seed: of torch's generators, before the answers of each mode.
    batches: an evaluation set, pairs of inputs and labels (rows,): its accuracy in eval mode is shown beside that of
        ten passes in training mode.

    The answer is the output's `logits`, or the output itself, or the first of several; of a sequence of logits the last
    position; of several rows the first. Raises ConfigError for a number of answers, ModelError for an output without
    logits.
    """
    if answers < 2:
        raise ConfigError(f"answers: expected 2 or more, to see whether they differ; found {answers}.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, found {type(model).__name__}.")
    was_training = tuple(path for path, module in model.named_modules() if module.training)
    with _as_found(model):
        model.train()
        torch.manual_seed(seed)
        statistics = tuple(_statistics(model, inputs))
        in_training = _answers(model, inputs, answers)
        model.eval()
        torch.manual_seed(seed)
        in_eval = _answers(model, inputs, answers)
        differing = None if all(torch.equal(in_eval[0], each) for each in in_eval) else _differing(model, inputs)
        gradients = _gradients(model, inputs)
        forgotten = None if batches is None else _forgotten(model, list(batches), seed)
    return Modes(
        behaviours=tuple(behaviours_of(model)),
        was_training=was_training,
        training=_described(in_training),
        evaluation=_described(in_eval),
        differing=differing,
        statistics=statistics,
        gradients=gradients,
        forgotten=forgotten,
        half_precision=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16)
        ),
    )


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Give modes, buffers and torch's random state back as they were."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for module, training in flags:
                module.training = training


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def _logits(output: Any) -> torch.Tensor:
    """Return the logits of all rows, (rows, classes)."""
    found = getattr(output, "logits", output)
    if isinstance(found, Sequence) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor) or found.ndim == 0:
        raise ModelError(
            f"expected an output with logits, a tensor or a tuple of tensors; found {type(output).__name__}."
        )
    if found.ndim == 1:
        found = found[None]
    return found[:, -1] if found.ndim == 3 else found.flatten(1)


def _answers(model: nn.Module, inputs: Any, count: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [_logits(_call(model, inputs))[0].detach().clone() for _ in range(count)]


def _described(answers: Sequence[torch.Tensor]) -> tuple[Answer, ...]:
    stacked = torch.stack([answer.double() for answer in answers])
    # Around the first: the mean of equal numbers is not always that number.
    mean = stacked[0] + (stacked - stacked[0]).mean(dim=0)
    return tuple(
        Answer(
            predicted=int(each.argmax()),
            top_logit=float(each.max()),
            from_first=float((each - stacked[0]).abs().mean()),
            from_mean=float((each - mean).abs().mean()),
        )
        for each in stacked
    )


def _statistics(model: nn.Module, inputs: Any) -> Iterator[RunningStatistics]:
    """Yield how far one pass moves what each batch norm remembers; it is put back."""
    norms = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), torch.Tensor)
    ]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for _, norm in norms]
    if norms:
        with torch.no_grad():
            _call(model, inputs)
    for (path, norm), (mean, variance) in zip(norms, before, strict=True):
        moved = [
            float((now - old).abs().max()) for now, old in ((norm.running_mean, mean), (norm.running_var, variance))
        ]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        yield RunningStatistics(path, *moved)


@contextlib.contextmanager
def _outputs(model: nn.Module, look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Show the tensors that each module puts out, in the order in which they are computed."""

    def hook_of(path: str) -> Callable[[nn.Module, Any, Any], None]:

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for tensor in _tensors(output):
                look(path, tensor)

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)


def _differing(model: nn.Module, inputs: Any) -> str:
    """Return the first module whose output is another one in a second pass, or the model's own name."""
    passes: list[list[tuple[str, torch.Tensor]]] = []
    for _ in range(2):
        seen: list[tuple[str, torch.Tensor]] = []
        passes.append(seen)

        def note(path: str, tensor: torch.Tensor, seen: list[tuple[str, torch.Tensor]] = seen) -> None:
            seen.append((path, tensor.detach().clone()))

        with torch.no_grad(), _outputs(model, note):
            _call(model, inputs)
    for (path, first), (_, second) in zip(*passes, strict=False):
        if not torch.equal(first, second):
            return path or type(model).__name__
    return type(model).__name__


def _gradients(model: nn.Module, inputs: Any) -> Gradients:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with_gradients = _logits(_call(model, inputs))
    asking: list[str] = []

    def note(path: str, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            asking.append(path)

    with torch.no_grad(), _outputs(model, note):
        without = _logits(_call(model, inputs))
    difference = (with_gradients.detach().double() - without.detach().double()).abs().max()
    return Gradients(
        is_equal=torch.equal(with_gradients.detach(), without.detach()),
        largest=float(difference),
        bytes_kept=sum(kept.values()),
        requires_grad=tuple(dict.fromkeys(path or type(model).__name__ for path in asking)),
    )


def _forgotten(model: nn.Module, batches: Sequence[tuple[Any, torch.Tensor]], seed: int) -> Forgotten:
    def accuracy() -> float:
        right = total = 0
        with torch.no_grad():
            for inputs, labels in batches:
                predicted = _logits(_call(model, inputs)).argmax(dim=-1)
                right += int((predicted.cpu() == labels.cpu()).sum())
                total += len(labels)
        return right / max(1, total)

    model.eval()
    in_eval = accuracy()
    model.train()
    torch.manual_seed(seed)
    return Forgotten(in_eval, tuple(accuracy() for _ in range(_FORGOTTEN_PASSES)))

"""What honest servers of other dtypes, kernels and quantisations differ by: the table in `swarm/trust/tolerance.py`.

    PETALS_EVAL_REALDATA=... python scripts/measure_tolerance.py

Loads stories260K and makes tiny models of other families; a minute of one processor. Prints the largest of all cases.
Below it stand the figures of `health/compare.py`: how much of the tolerance they use up on health's canaries.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from petals_eval.health.canary import canary_for
from petals_eval.model import LocalModel
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.trust.tolerance import LAST_BIT, Kind, excess, measure, relative_difference
from petals_eval.swarm.wire.span import Span
from tests.support.tensors import tf32
from tests.support.tiny_models import make_tiny

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
_BELOW = (-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0)
_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)
NF4 = torch.tensor((*_BELOW, *_ABOVE))  # the 16 levels of bitsandbytes' "normal float"
ROWS, POSITIONS = 16, 64
NOISE = "noise of 1% of the answer, at least"


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """In blocks of 64 weights, or 32 where a small matrix has no whole number of these."""
    blocks = weight.reshape(-1, 32 if weight.numel() % 64 else 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = ((blocks / scale).unsqueeze(-1) - NF4).abs().argmin(-1)
    return (NF4[levels] * scale).reshape(weight.shape)


def changed(span: BlockSpan, weights: Callable[[torch.Tensor], torch.Tensor], inputs: bool = False) -> BlockSpan:
    span = span.copied()
    for module in span._model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = weights(module.weight.data)
            if inputs:
                module.register_forward_pre_hook(lambda _, args: (weights(args[0]),))
    return span


def eager(span: BlockSpan) -> BlockSpan:
    span = changed(span, lambda weight: weight)
    span._model.set_attn_implementation("eager")
    return span


def cases(folder: Path, blocks: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield blocks start:stop and the hidden states before them."""
    draws = torch.Generator().manual_seed(0)
    local = LocalModel.from_pretrained(str(folder))
    ids = torch.randint(3, local.config.vocab_size, (ROWS, POSITIONS), generator=draws)
    ids[:, 0] = 1
    with torch.inference_mode():
        entering = local.embed(ids, None).float()
    span = BlockSpan.load(str(folder), 0, blocks, FLOAT)
    yield 0, blocks, entering
    yield 0, 1, entering
    yield blocks // 2, blocks, span.forward(entering, start=0, stop=blocks // 2)
    yield blocks - 1, blocks, span.forward(entering, start=0, stop=blocks - 1)
    yield 0, blocks, 30 * entering
    yield blocks - 1, blocks, 100 * entering


def pairs(folder: Path, blocks: int, has_kernels: bool) -> Iterator[tuple[str, torch.dtype, BlockSpan, BlockSpan]]:
    spans = {dtype: BlockSpan.load(str(folder), 0, blocks, dtype) for dtype in (FLOAT, HALF, BRAIN)}
    plain = spans[FLOAT]
    for dtype, span in spans.items():
        name = str(dtype).removeprefix("torch.")
        if has_kernels:
            yield f"{name}: another attention kernel", dtype, span, eager(span)
        if dtype is not FLOAT:
            yield f"float32 - {name}", dtype, plain, span
    yield "float16 - bfloat16", BRAIN, spans[HALF], spans[BRAIN]
    yield "float32: TF32 and not", FLOAT, plain, changed(plain, tf32, inputs=True)
    yield "float32 - int8 weights", BRAIN, plain, changed(plain, int8)
    yield "float32 - nf4 weights", BRAIN, plain, changed(plain, nf4)


def canary_use(
    folder: Path, blocks: int, kinds: Sequence[tuple[str, torch.dtype, BlockSpan, BlockSpan]]
) -> dict[str, float]:
    """Return by pair how much of the tolerance between two servers is used up on canaries; of noise the least."""
    plain = BlockSpan.load(str(folder), 0, blocks, FLOAT)
    used: dict[str, float] = {}
    for span in (Span(0, blocks), Span(0, 1), Span(blocks - 1, blocks), Span(blocks // 2, blocks)):
        canary = canary_for(span, plain.hidden_size, 16)
        for name, _, one, other in kinds:
            if "weights" not in name:
                first, second = (each.forward(canary, start=span.start, stop=span.stop) for each in (one, other))
                found = excess(canary, first, second, (Kind.of(first.dtype, None), Kind.of(second.dtype, None)))
                used[name] = max(found, used.get(name, 0.0))
        answer = plain.forward(canary, start=span.start, stop=span.stop)
        usual = 0.01 * answer.square().mean(dim=-1, keepdim=True).sqrt()
        for seed in range(10):
            noisy = answer + usual * torch.randn(answer.shape, generator=torch.Generator().manual_seed(seed))
            found = excess(canary, answer, noisy, (Kind.of(FLOAT, None), Kind.of(FLOAT, None)))
            used[NOISE] = min(found, used.get(NOISE, found))
    return used


def main() -> None:
    torch.set_num_threads(1)
    realdata = os.environ.get("PETALS_EVAL_REALDATA", "../shared/realdata")
    worst: dict[str, list[float]] = {}
    on_canaries: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = {"stories260K": (Path(realdata) / "stories260K-hf", 5)}
        for family in ("bloom", "llama", "qwen3", "falcon"):
            models[family] = (make_tiny(family, Path(temporary) / family, hidden=64, blocks=8), 8)
        for name, (folder, blocks) in models.items():
            kinds = list(pairs(folder, blocks, has_kernels=name not in ("bloom", "falcon")))
            for kind, used in canary_use(folder, blocks, kinds).items():
                on_canaries.setdefault(kind, []).append(used)
            for start, stop, question in cases(folder, blocks):
                for kind, dtype, one, other in kinds:
                    answers = [span.forward(question, start=start, stop=stop) for span in (one, other)]
                    found = measure(question, *answers, unit=1.0, last_bit=LAST_BIT[dtype])
                    tokens = (answers[0] - answers[1]).float().norm(dim=-1) / answers[0].float().norm(dim=-1)
                    whole = float((answers[0] - answers[1]).float().norm() / answers[0].float().norm())
                    row = [*found, whole, float(tokens.max()), relative_difference(question, *answers)]
                    worst[kind] = [max(pair) for pair in zip(row, worst.get(kind, row), strict=True)]
    print(f"{'':36} {'whole':>9} {'a token':>9} {'a value':>9} | {'L2 whole':>9} {'a token':>9} {'of done':>9}")
    for kind, row in sorted(worst.items()):
        print(f"{kind:36} " + " ".join(f"{value:9.2g}" for value in row[:3]), "|", end=" ")
        print(" ".join(f"{value:9.2g}" for value in row[3:]))
    print("\non canaries: how much of the tolerance is used up")
    for kind, shares in sorted(on_canaries.items()):
        print(f"{kind:36} {min(shares) if kind == NOISE else max(shares):9.2f}")


if __name__ == "__main__":
    main()

"""Rounding is never taken for a lie, nor a lie for rounding: real blocks, trained and of random weights."""

import pytest
import torch

from petals_eval.model import LocalModel
from petals_eval.model.blocks import BlockSpan
from petals_eval.swarm.trust.tolerance import Kind, excess, relative_difference
from tests.support.tiny_models import make_tiny

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FLOAT, HALF, BRAIN)


class Model:
    """Hidden states before some blocks of a model, and these blocks in each dtype."""

    def __init__(self, folder, blocks):
        local = LocalModel.from_pretrained(str(folder))
        ids = torch.randint(3, local.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            start = local.embed(ids, None).float()
        self.spans = {dtype: BlockSpan.load(str(folder), 0, blocks, dtype) for dtype in DTYPES}
        plain = self.spans[FLOAT]
        self.cases = [
            (0, blocks, start),
            (0, 1, start),
            (blocks - 1, blocks, plain.forward(start, start=0, stop=blocks - 1)),
            (0, blocks, 30 * start),
            (blocks - 1, blocks, 100 * start),
        ]


@pytest.fixture(scope="module", params=["stories260K", "bloom", "llama", "qwen3", "falcon"])
def model(request, realdata, tmp_path_factory):
    if request.param == "stories260K":
        return Model(realdata / "stories260K-hf", 5)
    folder = make_tiny(request.param, tmp_path_factory.mktemp("model") / request.param, hidden=64, blocks=8)
    return Model(folder, 8)


def kind(dtype, quant=None):
    return Kind.of(dtype, quant)


@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_servers_of_any_two_dtypes_agree(model, first, second):
    for start, end, question in model.cases:
        one, other = (model.spans[dtype].forward(question, start=start, stop=end) for dtype in (first, second))
        found = excess(question, one, other, (kind(first), kind(second)))
        assert found <= (0 if first is second else 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_adding_up_is_rounding(model, dtype):
    span = model.spans[dtype]
    if span.family.model_type in ("bloom", "falcon"):
        return  # they have one way of computing attention each
    eager = span.copied()
    eager._model.set_attn_implementation("eager")
    for start, end, question in model.cases:
        one, other = (blocks.forward(question, start=start, stop=end) for blocks in (span, eager))
        assert excess(question, one, other, (kind(dtype), kind(dtype))) <= (0.01 if dtype is FLOAT else 0.9)


def test_a_gpu_that_computes_float32_in_tf32_is_no_liar(model):
    """Imitated: weights and inputs rounded to its 10 bits of mantissa."""

    def tf32(values):
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    span = model.spans[FLOAT]
    other = span.copied()
    for module in other._model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (tf32(args[0]),))
    for start, end, question in model.cases:
        one, two = (blocks.forward(question, start=start, stop=end) for blocks in (span, other))
        assert 0 < excess(question, one, two, (kind(FLOAT), kind(FLOAT))) < 0.95


def test_noise_of_a_hundredth_is_never_taken_for_float32s_rounding(model):
    for seed, (start, end, question) in enumerate(model.cases * 4):
        answer = model.spans[FLOAT].forward(question, start=start, stop=end)
        draws = torch.Generator().manual_seed(seed)
        usual = answer.square().mean(dim=-1, keepdim=True).sqrt()
        noisy = answer + 0.01 * usual * torch.randn(answer.shape, generator=draws)
        assert excess(question, answer, noisy, (kind(FLOAT), kind(FLOAT))) > 1.5
        assert relative_difference(question, answer, noisy) >= 0.0085


@pytest.mark.parametrize(
    ("dtype", "bit"), [(FLOAT, 0), (FLOAT, 1), (FLOAT, 2), (FLOAT, 3), (FLOAT, 9), (HALF, 1), (BRAIN, 1)]
)
def test_one_flipped_bit_among_all_values_is_seen(model, dtype, bit):
    """float32: the sign, the exponent's high bits, the fraction's highest, of a value above the middle of its token.
    The others: the exponent's highest, of a value that grows by it; lesser bits are as large as their rounding."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    mask = 1 << (8 * dtype.itemsize - 1 - bit)
    for start, end, question in model.cases[:3]:
        answer = model.spans[dtype].forward(question, start=start, stop=end)
        for row, position in [(0, 0), (7, 31), (15, 63)]:
            flipped = answer.clone()
            values = flipped[row, position].float().abs()
            fits = values >= values.median() if dtype is FLOAT else (values > 0.1) & (values < 2)
            if not fits.any():
                continue
            column = int(torch.where(fits)[0][-1])
            flipped.view(integers)[row, position, column] ^= -mask if bit == 0 else mask
            if torch.isfinite(flipped).all():  # others are refused before anything is compared
                for pair in [(answer, flipped), (flipped, answer)]:
                    assert excess(question, *pair, (kind(dtype), kind(dtype))) > 1


@pytest.mark.parametrize("pair", [(FLOAT, FLOAT), (FLOAT, BRAIN), (BRAIN, BRAIN), (HALF, FLOAT)])
def test_answers_of_other_weights_and_of_other_requests_are_no_rounding(model, pair):
    first, second = pair
    kinds = (kind(first), kind(second))
    other = model.spans[second].shuffled(seed=1)
    for start, end, question in model.cases[:3]:
        answer = model.spans[first].forward(question, start=start, stop=end)
        assert excess(question, answer, other.forward(question, start=start, stop=end), kinds) > 1.5
        honest = model.spans[second].forward(question, start=start, stop=end)
        assert excess(question, answer, honest.roll(1, dims=0), kinds) > 1.5
        one_row = honest.clone()
        one_row[3] = honest[4]
        assert excess(question, answer, one_row, kinds) > 1.5
        assert excess(question, answer, question.to(second), kinds) > 1.5  # nothing computed at all


def test_quantised_weights_are_allowed_more_and_those_unknown_the_most():
    question, done = torch.randn(4, 8, 64), torch.randn(4, 8, 64)
    first = question + done
    second = first + 0.1 * torch.randn(4, 8, 64)
    found = [excess(question, first, second, (kind(FLOAT), kind(FLOAT, quant))) for quant in (None, "int8", "nf4", "?")]
    assert found[0] > 10 and found[0] > found[1] > found[2] == found[3]
    assert found[2] < 1
    assert kind(FLOAT) == kind(FLOAT, "none")


def test_a_channel_a_thousand_times_as_large_hides_nothing_and_accuses_nobody():
    """Trained models keep such; its own last bit is worth more than all that the others are given."""
    question, done = torch.randn(4, 8, 64), torch.randn(4, 8, 64)
    question[..., 7] = 3000.0
    answer = (question + done).bfloat16()
    rounded = answer.clone()
    rounded[..., 7] += 16
    kinds = (kind(BRAIN), kind(BRAIN))
    assert excess(question, answer, rounded, kinds) < 1
    wrong = answer.clone()
    wrong[2, 3, 5] += 16
    assert excess(question, answer, wrong, kinds) > 1
    noisy = (question + done).clone()
    noisy += 0.01 * torch.randn(noisy.shape)
    noisy[..., 7] = question[..., 7] + done[..., 7]
    assert excess(question, question + done, noisy, (kind(FLOAT), kind(FLOAT))) > 1


def test_equal_bits_differ_by_nothing_and_a_token_left_alone_may_be_rounded():
    question = torch.randn(2, 8, 64)
    answer = question + torch.randn(2, 8, 64)
    answer[0, 0] = question[0, 0]
    assert excess(question, answer, answer.clone(), (kind(FLOAT), kind(FLOAT))) == 0
    rounded = answer.clone()
    rounded[0, 0] += 1e-5
    assert excess(question, answer, rounded, (kind(FLOAT), kind(FLOAT))) < 1

"""Remote evaluation mode: what is asked, what is compared, who is caught, and what it costs. No network."""

import asyncio
import math

import pytest
import torch

from petals_eval.errors import MissingBlocksError, PeerNondeterministicError, PeerUnreachableError
from petals_eval.swarm.peers.peer import PeerBook
from petals_eval.swarm.pipeline import Pipeline
from petals_eval.swarm.transport.client import Answer
from petals_eval.swarm.trust.determinism import TOLERANCE, difference, dropout_in, question_from
from petals_eval.swarm.trust.determinism_guard import CheckedCalls
from tests.support.tiny_models import make_tiny
from tests.swarm.fakes import FakeDirectory, server, settings

SIZE = 64


def hidden_states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Blocks:
    """Servers of a model of residual blocks: each adds a mixture of what it is given, times `scale`.

    dropout: {server: {block: p}}; change it while it runs. rounding: servers that add up in another order each time.
    seeded: servers that give all rows of a call the same mask.
    """

    def __init__(self, size: int = SIZE, dtype: torch.dtype = torch.float32, scale: float = 0.3):
        self.weights = torch.randn(16, size, size, generator=torch.Generator().manual_seed(1)) / math.sqrt(size)
        self.dtype = dtype
        self.scale = scale
        self.dropout: dict[str, dict[int, float]] = {}
        self.rounding: set[str] = set()
        self.seeded: set[str] = set()
        self.calls: list[tuple[str, int, int, int]] = []  # server, first, last, tokens
        self.down: set[str] = set()

    async def forward(self, hop, hidden, prompts, *, lossless=False):
        name = hop.server.peer_id
        self.calls.append((name, hop.first, hop.last, hidden.shape[0] * hidden.shape[1]))
        await asyncio.sleep(0)
        if name in self.down:
            raise PeerUnreachableError("gone")
        generator = torch.Generator().manual_seed(torch.seed() % 2**31)
        states = hidden.to(self.dtype)
        for block in range(hop.first, hop.last):
            weights = self.weights[block].to(self.dtype)
            normed = torch.nn.functional.layer_norm(states, states.shape[-1:])
            if name in self.rounding:
                order = torch.randperm(weights.shape[0], generator=generator)
                first, second = order.chunk(2)
                added = normed[..., first] @ weights[first] + normed[..., second] @ weights[second]
            else:
                added = normed @ weights
            p = self.dropout.get(name, {}).get(block, 0.0)
            if p and name in self.seeded:  # one mask for every row of a call
                added = added * (torch.rand(added.shape[1:], generator=generator) >= p) / (1 - p)
            elif p:
                added = torch.nn.functional.dropout(added, p)
            states = states + self.scale * added
        return Answer(states, 0.001, 8, 8)

    async def forward_in_steps(self, hop, hidden, prompts, step):
        return await self.forward(hop, hidden, prompts)

    def forget(self, peer_id):
        pass


def swarm(blocks: Blocks, *servers, **values):
    chosen = settings(**{"min_backoff": 0.001, "deadline": 2, **values})
    peers = PeerBook(chosen)
    checked = CheckedCalls(blocks, peers, chosen)
    directory = FakeDirectory(max(one.end for one in servers), *servers)
    return Pipeline(checked, directory, peers, chosen), checked


def run(pipe, hidden, first=0, last=4):
    return asyncio.run(pipe.forward(hidden, None, first, last))


def run_all(pipe, micro_batches, at_once=8, last=4):
    """Many micro-batches, some at once; returns their answers in order."""

    async def everything():
        limit = asyncio.Semaphore(at_once)

        async def one(hidden):
            async with limit:
                return await pipe.forward(hidden, None, 0, last)

        return await asyncio.gather(*(one(hidden) for hidden in micro_batches))

    return asyncio.run(everything())


# -- the comparison


def test_equal_bits_are_no_difference_and_dropout_is_as_large_as_its_formula_says():
    question, added = hidden_states(6, 16, SIZE), torch.randn(6, 16, SIZE)
    assert difference(question, question + added, question + added) == 0.0
    for p in (0.01, 0.1, 0.5):
        first, second = (question + torch.nn.functional.dropout(added, p) for _ in range(2))
        assert difference(question, first, second) == pytest.approx(math.sqrt(2 * p / (1 - p)), rel=0.35)


def test_a_small_contribution_to_large_hidden_states_is_judged_by_itself():
    """Deep in a model a block adds a hundredth, and a few channels are a thousand times as large as the rest."""
    question, added = 100 * hidden_states(6, 16, SIZE), torch.randn(6, 16, SIZE)
    question[..., 3] = 50_000
    first, second = (question + torch.nn.functional.dropout(added, 0.01) for _ in range(2))
    assert difference(question, first, second) > 0.08
    assert difference(question.bfloat16(), first.bfloat16(), second.bfloat16()) > 0.06
    last_bit = question + added
    last_bit[..., 3] += 256  # of bfloat16 at this size
    assert difference(question, question + added, last_bit) == 0


def test_answers_that_differ_where_nothing_was_done_are_infinitely_different():
    question = torch.zeros(1, 2, 8)
    assert difference(question, question + 1, question - 1) == math.inf


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
def test_the_tolerance_lies_between_rounding_and_dropout(family, dtype, tmp_path):
    """Rounding: the same blocks by two ways of computing attention, or on halves of the batch. Dropout: 0.01."""
    from transformers import AutoModel

    folder = make_tiny(family, tmp_path / family, hidden=SIZE, blocks=4)
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    final = "ln_f" if family == "bloom" else "norm"
    setattr(model, final, torch.nn.Identity())
    question = question_from(3 * hidden_states(4, 30, SIZE)).to(dtype)

    def ask():
        with torch.inference_mode():
            return model(inputs_embeds=question, use_cache=False).last_hidden_state

    fused = ask()
    assert torch.equal(ask(), fused)  # two calls, the same bits
    if family != "bloom":
        model.set_attn_implementation("eager")
        assert 0 < difference(question, fused, ask()) < TOLERANCE[dtype]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.01
        for name in ("hidden_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.01)
    model.train()
    at_least = 1.2 if family == "bloom" else 0.0 if dtype is torch.bfloat16 else 1.2
    assert difference(question, ask(), ask()) > at_least * TOLERANCE[dtype]


@pytest.mark.parametrize("size", [8, 32, 64, 256, 768, 4096, 14336])
@pytest.mark.parametrize(("batch", "seq"), [(1, 16), (4, 30), (64, 16), (1, 500)])
def test_a_question_misses_dropout_of_a_hundredth_with_less_than_one_in_a_million(size, batch, seq):
    question = question_from(torch.zeros(1, 1, 1).expand(batch, seq, size))
    rows, positions, _ = question.shape
    weights = rows * positions * (positions + 1) // 2 * max(1, size // 128)
    for elements in (weights, rows * positions * size):
        assert (1 - 2 * 0.01 * 0.99) ** elements <= 1e-6
    assert rows * positions <= 256
    if size >= 768:
        assert rows * positions == 16


def test_a_question_is_made_of_the_hidden_states_under_way():
    hidden = hidden_states(2, 20, SIZE)
    question = question_from(hidden)
    assert question.shape == (6, 16, SIZE)
    assert torch.equal(question[3], hidden[1, :16])
    assert question_from(hidden_states(1, 3, SIZE)).shape == (85, 3, SIZE)


def test_dropout_in_a_config():
    config = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.0,
        "attn_pdrop": 0.2,
        "embd_pdrop": 0.1,
        "classifier_dropout": 0.1,
        "ffn_dropout": None,
        "layerdrop": 0.3,
    }
    assert dropout_in(config) == {"hidden_dropout": 0.1, "attn_pdrop": 0.2}


# -- who is asked when


def test_every_server_is_asked_once_before_its_first_micro_batch_however_many_wait():
    blocks = Blocks()
    pipe, checked = swarm(blocks, server("a", 0, 2), server("b", 2, 4))
    run_all(pipe, [hidden_states(4, 20, SIZE)] * 10)
    questions = [call for call in blocks.calls if call[3] == 96]
    assert sorted(questions) == [("a", 0, 2, 96)] * 2 + [("b", 2, 4, 96)] * 2
    assert [call[3] for call in blocks.calls if call[0] == "a"][:3] == [96, 96, 80]
    assert (checked.tokens_asked, checked.tokens_computed) == (4 * 96, 2 * 10 * 80)


def test_other_blocks_of_a_server_are_another_question():
    blocks = Blocks()
    pipe, _ = swarm(blocks, server("a", 0, 4))
    for first, last in [(0, 4), (1, 3), (0, 4)]:
        run(pipe, hidden_states(1, 16, SIZE), first, last)
    assert len(blocks.calls) == 3 + 2
    blocks = Blocks()
    pipe, _ = swarm(blocks, server("a", 0, 4))
    for first, last in [(0, 2), (1, 4), (1, 2)]:
        run(pipe, hidden_states(1, 16, SIZE), first, last)
    assert len(blocks.calls) == 3 + 4


def test_a_server_that_broke_off_is_asked_anew():
    blocks = Blocks()
    pipe, _ = swarm(blocks, server("a", 0, 4))
    run(pipe, hidden_states(1, 16, SIZE))
    blocks.down.add("a")

    async def back_soon():
        call = asyncio.create_task(pipe.forward(hidden_states(1, 16, SIZE), None, 0, 4))
        await asyncio.sleep(0.01)
        blocks.down.clear()
        blocks.dropout["a"] = {0: 0.1}  # somebody else's config this time
        return await call

    with pytest.raises(MissingBlocksError, match="training mode"):
        asyncio.run(back_soon())


@pytest.mark.parametrize("p", [0.01, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dropout_is_caught_before_anything_is_computed(dtype, p):
    for _ in range(20):
        blocks = Blocks(dtype=dtype)
        blocks.dropout["a"] = dict.fromkeys(range(4), p)
        pipe, checked = swarm(blocks, server("a", 0, 4))
        with pytest.raises(MissingBlocksError):
            run(pipe, hidden_states(4, 20, SIZE))
        assert checked.tokens_computed == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nobody_honest_is_accused(dtype):
    """Not even who adds up in another order each time."""
    for _ in range(20):
        blocks = Blocks(dtype=dtype)
        blocks.rounding.add("b")
        pipe, _ = swarm(blocks, server("a", 0, 4), server("b", 4, 12))
        run(pipe, hidden_states(4, 20, SIZE), last=12)
        status = pipe.status()
        assert (status.unequal, status.notices) == ((), ())


def test_dropout_in_one_block_of_many_is_found_where_rounding_could_explain_it():
    """In bfloat16 it is thinned below the tolerance by the other blocks: each block is then asked by itself."""
    caught = 0
    for _ in range(20):
        blocks = Blocks(dtype=torch.bfloat16, size=640)
        blocks.dropout["a"] = {9: 0.01}
        pipe, _ = swarm(blocks, server("a", 0, 16))
        with pytest.raises(MissingBlocksError):
            run(pipe, hidden_states(4, 20, 640), last=16)
        caught += any(last - first == 1 for _, first, last, _ in blocks.calls)
    assert caught > 10


def test_a_server_whose_rows_are_equal_within_a_call_but_not_across_calls_is_caught():
    blocks = Blocks()
    blocks.dropout["a"] = {0: 0.1}
    blocks.seeded.add("a")
    pipe, _ = swarm(blocks, server("a", 0, 4))
    with pytest.raises(MissingBlocksError):
        run(pipe, hidden_states(4, 20, SIZE))


# -- what becomes of it


def test_a_server_that_is_caught_is_named_and_left_out_where_others_hold_its_blocks():
    blocks = Blocks()
    blocks.dropout["dropping"] = dict.fromkeys(range(4), 0.1)
    pipe, _ = swarm(
        blocks, server("dropping", 0, 4, version="2.2.0"), server("a", 0, 4), server("b", 0, 2), server("c", 2, 4)
    )
    pipe.distrust.config_dropout = {"hidden_dropout": 0.1}
    quiet, _ = swarm(Blocks(), server("a", 0, 4))
    batches = [hidden_states(4, 20, SIZE) + index for index in range(30)]
    answers = run_all(pipe, batches)
    for (found, hops), (expected, _) in zip(answers, run_all(quiet, batches), strict=True):
        assert torch.equal(found, expected)
        assert "dropping" not in {hop.peer_id for hop in hops}
    status = pipe.status()
    (unequal,) = status.unequal
    assert (unequal.server.peer_id, unequal.is_used) == ("dropping", False)
    assert unequal.difference > 0.2
    (notice,) = status.notices
    assert notice == (
        f"warning: server ...opping (blocks 0:4, petals 2.2.0) gave two answers to one question (difference "
        f"{unequal.difference:.2g}): its blocks run in training mode (this model's config has hidden_dropout 0.1). "
        "It is left out; 1 other server holds these blocks."
    )


def test_without_another_the_run_stops_at_once_and_says_why_and_how_to_go_on():
    blocks = Blocks()
    blocks.dropout |= {"d1": {1: 0.1}, "d2": {1: 0.1}}
    pipe, _ = swarm(blocks, server("a", 0, 1), server("d1", 1, 4), server("d2", 1, 2), server("b", 2, 4), deadline=60)
    with pytest.raises(MissingBlocksError) as caught:
        run(pipe, hidden_states(4, 20, SIZE))
    assert caught.value.exit_code == 3
    assert caught.value.missing == ((1, 2),)
    message = str(caught.value)
    assert "no server in evaluation mode holds blocks 1:2" in message
    assert "...d1 (blocks 1:4, petals of unknown version) gave two answers to one question" in message
    assert "...d2 (blocks 1:2" in message
    assert "--allow-nondeterministic" in message


def test_somebody_who_has_come_since_the_last_look_is_used_instead():
    blocks = Blocks()
    blocks.dropout["d"] = {0: 0.1}
    pipe, _ = swarm(blocks, server("d", 0, 4))
    newcomer = FakeDirectory(4, server("d", 0, 4), server("a", 0, 4)).snapshot
    pipe.distrust._directory.on_look = lambda directory: setattr(directory, "snapshot", newcomer)
    _, hops = run(pipe, hidden_states(4, 20, SIZE))
    assert [hop.peer_id for hop in hops] == ["a"]


def test_allowed_it_is_used_for_what_nobody_else_holds_and_for_nothing_more():
    blocks = Blocks()
    blocks.dropout["d"] = {0: 0.1}
    pipe, _ = swarm(blocks, server("d", 0, 4), server("a", 2, 4), allow_nondeterministic=True)
    for _ in range(3):
        _, hops = run(pipe, hidden_states(4, 20, SIZE))
    assert [hop.peer_id for hop in hops] == ["d"]  # all of it in one hop: its later blocks are as good as anybody's
    (unequal,) = pipe.status().unequal
    assert unequal.is_used
    (notice,) = pipe.status().notices
    assert notice.endswith("training mode. Nobody else holds these blocks, so it is used all the same.")


def test_a_server_caught_in_mid_run_loses_also_what_is_in_flight():
    blocks = Blocks(size=640)
    pipe, _ = swarm(blocks, server("a", 0, 4), server("b", 0, 4), recheck_share=0.01, deadline=60)
    batches = [hidden_states(4, 64, 640) + index for index in range(200)]
    run_all(pipe, batches[:20])
    assert pipe.status().unequal == ()
    blocks.dropout["a"] = dict.fromkeys(range(4), 0.01)
    answers = run_all(pipe, batches)
    (unequal,) = pipe.status().unequal
    assert unequal.server.peer_id == "a"
    assert sum(hops[0].peer_id == "a" for _, hops in answers) < 40  # asked again early, after so much of its own work


def test_after_being_caught_a_server_is_refused_whatever_was_decided_before():
    blocks = Blocks()
    blocks.dropout["d"] = {0: 0.1}
    chosen = settings()
    checked = CheckedCalls(blocks, PeerBook(chosen), chosen)
    hop = run_hop("d")

    async def twice():
        for _ in range(2):
            with pytest.raises(PeerNondeterministicError):
                await checked.forward(hop, hidden_states(4, 20, SIZE), None)
            with pytest.raises(PeerNondeterministicError):
                await checked.forward_in_steps(hop, hidden_states(4, 20, SIZE), None, 8)

    asyncio.run(twice())
    assert len(blocks.calls) == 2


def run_hop(name: str):
    from petals_eval.swarm.directory.routing import Hop

    return Hop(server(name, 0, 4), 0, 4)


# -- what it costs


@pytest.mark.parametrize(("size", "replicas"), [(64, 1), (64, 3), (1024, 10), (4096, 40)], ids=lambda value: str(value))
def test_checks_cost_less_than_a_hundredth_of_the_tokens_of_ten_thousand_examples(size, replicas):
    """TREC's length: 10,000 questions of about 20 tokens with 8 prompt tokens, in micro-batches of 1,024."""

    class Echo(Blocks):
        async def forward(self, hop, hidden, prompts, *, lossless=False):
            await asyncio.sleep(0)
            return Answer(hidden, 0.001, 8, 8)

    servers = [server(f"{start}-{index}", start, start + 2) for start in (0, 2) for index in range(replicas)]
    pipe, checked = swarm(Echo(), *servers)
    hidden = torch.zeros(1, 1, 1).expand(36, 28, size)
    run_all(pipe, [hidden] * (10_000 // 36), at_once=3 * replicas)
    used = {peer for peer, history in pipe.peers.histories.items() if history.calls}
    assert len(used) == 2 * replicas
    assert checked.tokens_computed >= 2 * 275_000
    share = checked.tokens_asked / checked.tokens_computed
    print(f"hidden size {size}, {replicas} replicas: {share:.2%} of the tokens")
    assert 0.002 < share < 0.01


def test_the_first_question_is_not_counted_as_work():
    """A server that loads before it answers anything would be taken for slow, and not be called again."""

    class Loads(Blocks):
        async def forward(self, hop, hidden, prompts, **options):
            await asyncio.sleep(0.5 if len(self.calls) < 2 else 0.0)
            return await super().forward(hop, hidden, prompts, **options)

    pipe, _ = swarm(Loads(), server("a", 0, 4))
    run(pipe, hidden_states(4, 20, SIZE))
    assert pipe.peers.of("a").flow.rate > 4 * 20 * 4 / 0.4

"""Activations: what of them enters a block, and in which parts they are sent."""

import pytest
import torch

from petals_eval.errors import GradientError
from petals_eval.swarm.activations import Activations, refuse_gradients

HIDDEN = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
PROMPTS = torch.arange(4 * 2 * 3 * 3.0).reshape(4, 2, 3, 3)  # of blocks 2:6


def test_sizes_are_those_of_the_hidden_states():
    of = Activations(HIDDEN.half())
    assert (of.rows, of.positions, of.tokens, of.hidden_size, of.values, of.nbytes) == (2, 5, 10, 3, 30, 60)


def test_the_prompts_of_the_blocks_that_are_entered_go_with_them():
    whole = Activations(HIDDEN, PROMPTS, start=2)
    part = whole.entering(3, 5)
    assert part.start == 3 and torch.equal(part.prompts, PROMPTS[1:3]) and part.hidden is HIDDEN
    answer = HIDDEN + 1
    rest = part.after(answer, 4)
    assert rest.start == 4 and torch.equal(rest.prompts, PROMPTS[2:3]) and rest.hidden is answer
    assert whole.after(answer, 6).prompts.shape[0] == 0


def test_without_prompts_nothing_is_sliced():
    whole = Activations(HIDDEN)
    assert whole.entering(3, 5) is whole
    assert whole.after(HIDDEN, 4).prompts is None
    assert whole.by_rows(2) == [whole]


@pytest.mark.parametrize(("at_once", "rows"), [(1, [1, 1]), (2, [2]), (7, [2])])
def test_rows_take_their_prompts_along(at_once, rows):
    parts = Activations(HIDDEN, PROMPTS, start=2).by_rows(at_once)
    assert [part.rows for part in parts] == rows and {part.start for part in parts} == {2}
    assert torch.equal(torch.cat([part.hidden for part in parts]), HIDDEN)
    assert torch.equal(torch.cat([part.prompts for part in parts], dim=1), PROMPTS)


def test_prompts_for_all_rows_go_with_each():
    shared = PROMPTS[:, :1]
    assert all(torch.equal(part.prompts, shared) for part in Activations(HIDDEN, shared, start=2).by_rows(1))


def test_steps_take_the_prompts_of_their_positions():
    parts = Activations(HIDDEN, PROMPTS, start=2).by_positions(2)
    assert [part.positions for part in parts] == [2, 2, 1]
    assert [part.prompts.shape[2] for part in parts] == [2, 1, 0]
    assert torch.equal(torch.cat([part.hidden for part in parts], dim=1), HIDDEN)
    assert torch.equal(torch.cat([part.prompts for part in parts], dim=2), PROMPTS)


@pytest.mark.parametrize("which", ["hidden", "prompts"])
def test_gradients_are_refused_where_they_would_be_lost(which):
    tensors = {"hidden": HIDDEN.clone(), "prompts": PROMPTS.clone()}
    tensors[which].requires_grad_()
    with pytest.raises(GradientError, match="computes no gradients"):
        refuse_gradients(**tensors)
    with torch.no_grad():
        refuse_gradients(**tensors)
    refuse_gradients(HIDDEN, None)

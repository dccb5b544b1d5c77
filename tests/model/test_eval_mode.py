"""The guard gives modules back as it found them, and a training loop around it does not notice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from petals_eval.model import evaluating


class Net(nn.Module):
    """Dropout and batch-norm: each answers differently in training, and the second one learns from what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def _flags(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def test_outputs_are_deterministic_and_need_no_grad(net):
    inputs = torch.randn(5, 6)
    assert not torch.equal(net(inputs), net(inputs))
    with evaluating(net):
        first, second = net(inputs), net(inputs)
        assert not any(_flags(net))
    assert torch.equal(first, second)
    assert not first.requires_grad and first.grad_fn is None
    assert all(_flags(net))


def test_running_statistics_are_untouched(net):
    net(torch.randn(5, 6))
    before = copy.deepcopy(net.state_dict())
    with evaluating(net):
        net(torch.randn(5, 6))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_mixed_flags_come_back_also_after_an_exception(net):
    net.body[1].eval()
    net.head.eval()
    before = _flags(net)
    assert len(set(before)) == 2
    with evaluating(net):
        assert not any(_flags(net))
    assert _flags(net) == before
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert _flags(net) == before
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_training_part_in_a_model_that_is_in_eval_mode(net):
    net.eval()
    net.body[3].train()
    before = _flags(net)
    with evaluating(net):
        assert not any(_flags(net))
    assert _flags(net) == before


def test_guards_nest_and_modules_may_share_parts(net):
    outer = nn.Sequential(net.body, net.head)
    with evaluating(net, outer):
        with evaluating(net):
            pass
        assert not any(_flags(outer))
    assert all(_flags(outer)) and all(_flags(net))


def test_a_module_that_does_more_when_its_mode_changes_sees_both_changes():
    class Merging(nn.Linear):
        """As LoRA layers that merge their weights for evaluation."""

        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged and model[0].training


def _train(net: Net, steps: int, after_each_step) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(net(torch.randn(16, 6)), torch.randint(0, 3, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_each_step(net)
    return losses, net.state_dict()


def test_a_training_loop_goes_on_with_the_same_bits(net):
    inputs = torch.randn(9, 6)

    def evaluate(model: Net) -> None:
        with evaluating(model):
            model(inputs)
            torch.randn(100)  # even what draws numbers inside leaves the generator where it was

    quiet, quiet_state = _train(copy.deepcopy(net), 6, lambda model: None)
    losses, state = _train(copy.deepcopy(net), 6, evaluate)
    assert losses == quiet
    assert all(torch.equal(state[name], quiet_state[name]) for name in state)


def test_the_comparison_notices_an_evaluation_without_the_guard(net):
    inputs = torch.randn(9, 6)
    quiet, _ = _train(copy.deepcopy(net), 6, lambda model: None)
    losses, _ = _train(copy.deepcopy(net), 6, lambda model: model(inputs))
    assert losses != quiet


def test_gradients_in_the_making_are_kept(net):
    loss = net(torch.randn(5, 6)).sum()
    with evaluating(net):
        net(torch.randn(5, 6))
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_buffer_that_grew_inside_is_fit_for_training_afterwards():
    class Caching(nn.Module):
        """As rotary embeddings, which keep the angles of the longest text seen."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.cache: torch.Tensor
            self.register_buffer("cache", torch.ones(1), persistent=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if len(inputs) > len(self.cache):
                self.cache = torch.ones(len(inputs))
            return self.linear(inputs) * self.cache[: len(inputs), None]

    model = Caching()
    with evaluating(model):
        model(torch.randn(7, 2))
        assert model.cache.is_inference()
    model(torch.randn(7, 2)).sum().backward()
    assert len(model.cache) == 7

import copy

import pytest
import torch
from torch import nn

from normally.lab import shift
from normally.lab.networks import lenet


def test_earth_mover_of_known_distributions():
    normal = torch.distributions.Normal(0.0, 1.0)
    levels = (torch.arange(1000) + 0.5) / 1000
    a = normal.icdf(levels).unsqueeze(1)
    assert shift.earth_mover(a, a) == 0
    assert shift.earth_mover(a, a + 0.5) == pytest.approx(0.5, rel=1e-2)
    # Twice as wide: E|x| = √(2/π) apart, and the spread of both together is √2.5.
    expected = (2 / torch.pi) ** 0.5 / 2.5**0.5
    assert shift.earth_mover(a, 2 * a) == pytest.approx(expected, rel=1e-2)
    assert shift.earth_mover(10 * a, 10 * a + 5) == pytest.approx(0.5, rel=1e-2)
    two = torch.cat([a, a], 1)
    assert shift.earth_mover(two, two + torch.tensor([1.0, 0.0])) == pytest.approx(0.5, rel=1e-2)


def test_the_gradient_shift_is_that_of_two_explicit_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    found = shift.gradient_shift(model, x, y, 0.5)

    def gradients(model):
        model = copy.deepcopy(model)
        nn.functional.cross_entropy(model(x), y).backward()
        return model

    g = gradients(model)
    for place in (1, 2):
        stepped = copy.deepcopy(model)
        with torch.no_grad():
            for k in range(place):
                stepped[k].weight -= 0.5 * g[k].weight.grad
                stepped[k].bias -= 0.5 * g[k].bias.grad
        before, after = g[place].weight.grad, gradients(stepped)[place].weight.grad
        change = (after - before).norm().item()
        assert found["absolute"][place - 1] == pytest.approx(change)
        assert found["relative"][place - 1] == pytest.approx(change / before.norm().item())
    assert all(value == 0 for value in shift.gradient_shift(model, x, y, 0.0)["absolute"])


def test_measuring_leaves_the_network_alone():
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(64, 1, 8, 8)
    shift.gradient_shift(model, x, torch.arange(64) % 10, 0.1)
    inputs = shift.layer_inputs(model, x)
    assert [tuple(values.shape) for values in inputs] == [
        (shift.QUANTILES, units) for units in (6, 64, 120, 84)
    ]
    assert all((values.diff(dim=0) >= 0).all() for values in inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_moved_is_a_value_a_layer():
    a = [torch.arange(4.0).unsqueeze(1), torch.arange(6.0).reshape(3, 2)]
    assert shift.moved(a, a) == [0.0, 0.0]
    assert shift.moved(a, [a[0] + 1, a[1]])[1] == 0

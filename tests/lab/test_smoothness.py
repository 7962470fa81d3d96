import math

import pytest
import torch

from normally.lab.networks import lenet
from normally.lab.smoothness import along_gradient, distance, length, of_network

CURVATURES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def quadratic(start):
    """½ Σ c·w², its parameter, and the known gradient c·w."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    return (lambda: (CURVATURES * w * w).sum() / 2), w, CURVATURES * w.detach()


def test_a_quadratic_has_its_known_numbers():
    loss, w, g = quadratic([1.0, -2.0, 0.5])
    steps = (0.1, 0.2, 0.4)
    found = along_gradient(loss, [w], steps)
    # L(w - t·g) = L - t·|g|² + ½ t² gᵀAg, and its gradient moves by t·A·g.
    bend = float((CURVATURES * g * g).sum())
    losses = [loss().item()] + [loss().item() - t * float(g @ g) + t * t * bend / 2 for t in steps]
    moved = float((CURVATURES * g).norm())
    assert found.loss == pytest.approx(losses[0])
    assert found.gradient == pytest.approx(float(g.norm()))
    assert found.loss_range == pytest.approx(max(losses) - min(losses))
    assert found.gradient_change == pytest.approx(0.4 * moved)
    assert found.beta == pytest.approx(moved / float(g.norm()))


def test_beta_is_the_curvature_where_there_is_only_one():
    w = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    for steps in ([1e-3], [0.1, 5.0]):
        found = along_gradient(lambda: 7 * w.square().sum() / 2, [w], steps)
        assert found.beta == pytest.approx(7.0)


def test_distances_are_moved_whatever_the_gradient():
    loss, w, g = quadratic([1.0, -2.0, 0.5])
    found = along_gradient(loss, [w], [0.3], distances=True)
    assert found.gradient_change == pytest.approx(0.3 * found.beta)
    assert found.gradient_change == pytest.approx(0.3 * float((CURVATURES * g).norm() / g.norm()))


def test_a_flat_place_is_smooth_and_an_overflow_is_not():
    flat = torch.zeros(2, requires_grad=True)
    found = along_gradient(lambda: flat.square().sum(), [flat], [0.1], distances=True)
    assert (found.loss_range, found.gradient_change, found.beta) == (0.0, 0.0, 0.0)
    steep = torch.full((1,), 50.0, requires_grad=True)
    found = along_gradient(lambda: steep.exp().exp().sum(), [steep], [1.0])
    assert found.beta == found.loss_range == found.gradient_change == math.inf


def test_lengths_are_those_of_one_long_vector():
    a, b = [torch.ones(2, 2), torch.zeros(5)], [torch.zeros(2, 2), torch.ones(5)]
    assert distance(a, b) == 3.0
    assert length(a) == 2.0


def test_looking_ahead_leaves_the_network_alone():
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = of_network(model, torch.randn(16, 1, 8, 8), torch.arange(16) % 10, [0.1, 0.4])
    assert found.loss_range > 0
    assert found.beta > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_parameters_come_back_bit_for_bit():
    loss, w, _ = quadratic([0.1, 0.7, -0.3])
    before = w.detach().clone()
    along_gradient(loss, [w], [0.3, 0.1])
    assert torch.equal(w.detach(), before)

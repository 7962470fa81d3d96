"""The formulas, and the worked examples with their numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import functional, nn, reference
from tests.helpers import values

# Worked example 1: 18 values, N=3, C=1, H=1, W=6.
EXAMPLE = torch.tensor(
    [
        [11.1, -2.2, 23.3, 54.4, 58.5, -16.6],
        [-97.7, -28.8, 49.9, -61.3, 52.6, -33.9],
        [-2.45, -15.7, 72.4, 9.1, 47.2, 21.7],
    ],
    dtype=torch.float64,
).view(3, 1, 1, 6)
NORMALIZED = torch.tensor(
    [
        [0.073358, -0.228133, 0.349912, 1.0549, 1.147841, -0.554558],
        [-2.392967, -0.831113, 0.952892, -1.567836, 1.014097, -0.946722],
        [-0.2338, -0.534156, 1.462932, 0.028021, 0.891688, 0.313643],
    ],
    dtype=torch.float64,
).view(3, 1, 1, 6)
FIRST_ROW_UNBIASED = torch.tensor(
    [0.071291, -0.221705, 0.340054, 1.025179, 1.115501, -0.538933], dtype=torch.float64
)
# The numbers are given to six decimals: half a unit of the last, and float32's share above it.
SIX_DECIMALS = {"rtol": 0.0, "atol": 6e-7}


def test_example_1_moments() -> None:
    mean, var = reference.moments(EXAMPLE, (0, 2, 3))
    assert mean.shape == var.shape == (1, 1, 1, 1)
    # All digits given; sums of 18 numbers below 1e4 round at 1e-12.
    assert mean.item() == pytest.approx(7.863888888888889, abs=1e-12)
    assert var.item() == pytest.approx(1946.0649459876545, abs=1e-9)
    assert reference.unbiased(var, 18).item() == pytest.approx(2060.5393545751635, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_example_1_output(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = EXAMPLE.to(dtype).contiguous(memory_format=memory_format)
    layer = nn.BatchNorm2d(1, eps=1e-5, dtype=dtype)
    for y in (
        reference.batch_norm(x),
        functional.batch_norm(x, None, None, training=True),
        layer(x).detach(),
    ):
        torch.testing.assert_close(y.double(), NORMALIZED, **SIX_DECIMALS)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.item() == pytest.approx(0.1 * 7.863888888888889, rel=3e-7)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 2060.5393545751635, rel=3e-7)


def test_example_1_normalized_with_the_unbiased_variance() -> None:
    """tiny-dnn's convention."""
    for y in (
        reference.batch_norm(EXAMPLE, correction=1),
        functional.batch_norm(EXAMPLE, None, None, training=True, correction=1),
        nn.BatchNorm2d(1, correction=1, dtype=torch.float64)(EXAMPLE).detach(),
    ):
        torch.testing.assert_close(y[0, 0, 0], FIRST_ROW_UNBIASED, **SIX_DECIMALS)


def test_example_2_running_statistics_by_hand() -> None:
    """Two mini-batches through BatchNorm3d on (3, 2, 2, 2, 3) with momentum 0.3."""
    layer = nn.BatchNorm3d(2, momentum=0.3, dtype=torch.float64)
    mean, var = [0.0, 0.0], [1.0, 1.0]
    for seed in (1, 2):
        x = values((3, 2, 2, 2, 3), torch.float64, seed=seed)
        layer(x)
        for c in range(2):
            numbers = x[:, c].flatten().tolist()
            assert len(numbers) == 36
            batch_mean = sum(numbers) / 36
            batch_var = sum((v - batch_mean) ** 2 for v in numbers) / 35
            mean[c] = 0.7 * mean[c] + 0.3 * batch_mean
            var[c] = 0.7 * var[c] + 0.3 * batch_var
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.tolist() == pytest.approx(mean, rel=1e-13, abs=1e-14)
    assert layer.running_var.tolist() == pytest.approx(var, rel=1e-13)
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 2


@pytest.mark.parametrize("normalized_shape", [(2, 3, 4), (3, 4), (4,)])
def test_example_3_the_statistics_of_layer_norm(normalized_shape: tuple[int, ...]) -> None:
    """A sample of (8, 2, 3, 4) has one mean and one variance for (2, 3, 4), more for less."""
    x = values((8, 2, 3, 4), torch.float64)
    count = {3: 8, 2: 8 * 2, 1: 8 * 2 * 3}[len(normalized_shape)]
    mean, var = reference.moments(x, range(-len(normalized_shape), 0))
    assert mean.numel() == var.numel() == count
    samples = x.reshape(count, -1).tolist()
    wanted = torch.empty(count, len(samples[0]), dtype=torch.float64)
    for n, numbers in enumerate(samples):
        own_mean = sum(numbers) / len(numbers)
        own_var = sum((v - own_mean) ** 2 for v in numbers) / len(numbers)
        assert mean.flatten()[n].item() == pytest.approx(own_mean, abs=1e-14)
        assert var.flatten()[n].item() == pytest.approx(own_var, rel=1e-13)
        for i, v in enumerate(numbers):
            wanted[n, i] = (v - own_mean) / (own_var + 1e-5) ** 0.5
    layer = nn.LayerNorm(normalized_shape, dtype=torch.float64)
    for training in (True, False):  # the same in both
        y = layer.train(training)(x).detach()
        torch.testing.assert_close(y.view_as(wanted), wanted, rtol=1e-12, atol=1e-12)
    assert layer.weight.shape == layer.bias.shape == normalized_shape
    assert not list(layer.buffers())  # no running statistics
    if len(normalized_shape) == 3:
        assert count == 8


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (6, 3, 4)),
        (nn.BatchNorm2d, (6, 3, 4, 5)),
        (nn.BatchNorm3d, (6, 3, 2, 4, 5)),
    ],
)
def test_example_4_the_shapes_of_the_layers(layer: type, shape: tuple[int, ...]) -> None:
    x = values(shape, torch.float64)
    y = layer(3, dtype=torch.float64)(x)
    assert y.shape == shape
    torch.testing.assert_close(y.detach(), reference.batch_norm(x))


def test_example_5_one_sample_teaches_a_dense_layer_nothing() -> None:
    sample = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    y = reference.batch_norm(sample)
    assert y.tolist() == [[0.0, 0.0, 0.0]]
    y.sum().backward()
    assert sample.grad is not None
    assert sample.grad.tolist() == [[0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm1d(3)(sample)


def test_formula_1_and_2_statistics_are_per_channel_over_all_positions() -> None:
    x = values((4, 3, 5, 6), torch.float64)
    mean, var = reference.moments(x, (0, 2, 3))
    assert mean.shape == (1, 3, 1, 1)
    for c in range(3):
        numbers = x[:, c].flatten()
        assert mean[0, c, 0, 0].item() == pytest.approx(numbers.sum().item() / 120, rel=1e-12)
        assert var[0, c, 0, 0].item() == pytest.approx(
            (numbers**2).mean().item() - numbers.mean().item() ** 2, rel=1e-10
        )
    over_n_alone = x.mean(0)
    assert over_n_alone.shape == (3, 5, 6)
    torch.testing.assert_close(reference.batch_norm(x), F.batch_norm(x, None, None, training=True))


def test_formula_3_momentum_weighs_the_new_value() -> None:
    running, batch = torch.tensor([10.0]), torch.tensor([20.0])
    assert reference.running_average(running, batch, 0.1).item() == pytest.approx(11.0)
    keras_momentum = 0.9  # the weight of the old value
    assert reference.running_average(running, batch, 1 - keras_momentum).item() == pytest.approx(11)


def test_formula_4_population_statistics() -> None:
    batches = [values((5, 3, 4), torch.float64, seed=seed) for seed in range(3)]
    mean, var = reference.population_statistics(batches)
    torch.testing.assert_close(mean, torch.stack([b.mean((0, 2)) for b in batches]).mean(0))
    torch.testing.assert_close(var, torch.stack([b.var((0, 2)) for b in batches]).mean(0))
    last = [b.movedim(1, -1) for b in batches]
    torch.testing.assert_close(reference.population_statistics(last, -1), (mean, var))


def test_formula_5_a_sample_does_not_feel_its_neighbours() -> None:
    x = values((6, 3, 4), torch.float64)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    together = reference.batch_norm(x, mean, var)
    alone = torch.cat([reference.batch_norm(sample[None], mean, var) for sample in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("normalized_shape", [(2, 3, 4), (3, 4), (4,)])
def test_formula_6_layer_norm(normalized_shape: tuple[int, ...]) -> None:
    x = values((8, 2, 3, 4), torch.float64)
    weight, bias = torch.randn(normalized_shape).double(), torch.randn(normalized_shape).double()
    torch.testing.assert_close(
        reference.layer_norm(x, normalized_shape, weight, bias),
        F.layer_norm(x, normalized_shape, weight, bias),
    )
    mean, var = reference.moments(x, range(-len(normalized_shape), 0))
    statistics = {3: 8, 2: 16, 1: 48}[len(normalized_shape)]
    assert mean.numel() == var.numel() == statistics


def test_formula_7_gamma_and_beta_that_give_the_identity() -> None:
    x = values((4, 3, 5), torch.float64)
    mean, var = (t.flatten() for t in reference.moments(x, (0, 2)))
    weight, bias = reference.identity_parameters(mean, var)
    torch.testing.assert_close(reference.batch_norm(x, weight=weight, bias=bias), x)
    y = functional.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(y, x)


def test_formula_8_a_bias_before_it_cancels() -> None:
    x, shift = values((4, 3, 5), torch.float64), torch.tensor([1.0, -20.0, 300.0])
    for norm in (reference.batch_norm, _trained):
        torch.testing.assert_close(
            norm(x + shift.double().view(1, 3, 1)), norm(x), rtol=0, atol=1e-12
        )


def _trained(x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True)


def test_formula_9_variance_grows_by_n_without_and_stays_with_normalization() -> None:
    n = 256
    plain = normalized = torch.randn(2000, n, dtype=torch.float64)
    for _ in range(3):
        weight = torch.randn(n, n, dtype=torch.float64)
        before = plain.var().item()
        plain = plain @ weight
        # n·D(X)·D(W) with D(W) = 1; n² = 65536 random weights leave it uncertain by about 1 %.
        assert plain.var().item() / before == pytest.approx(n, rel=0.05)
        normalized = reference.batch_norm(normalized @ weight)
        assert normalized.var().item() == pytest.approx(1.0, rel=1e-3)
        small = torch.randn(2000, n, dtype=torch.float64) @ (weight / n**0.5)
        assert small.var().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activations_are_torchs(act: str) -> None:
    z = torch.linspace(-8, 8, 161, dtype=torch.float64)
    named = {
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    function = named[act] if act in named else getattr(F, act)
    assert torch.equal(reference.activate(z, act), function(z))
    assert torch.equal(reference.activate(z, None), z)


def test_a_constant_channel_is_the_bias() -> None:
    """Where the mean of m equal values is that value, which the reference must see to as well."""
    for constant in (0.1, 1e7 + 0.1, 1e30):
        x = torch.full((7, 3, 11), constant, dtype=torch.float64)
        assert torch.equal(reference.batch_norm(x), torch.zeros_like(x)), constant

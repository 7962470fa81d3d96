"""Frozen batch norm against the float64 reference: one multiply-add with fixed statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import frozen_batch_norm
from tests.helpers import (
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

SHAPES = [
    (3, 1), (5, 17), (2, 64), (4, 4097), (3, 2, 1), (2, 5, 7), (3, 16, 15), (2, 17, 16),
    (1, 65, 33), (2, 3, 513), (1, 2, 4095), (2, 24, 7, 7), (3, 130, 2, 2), (1, 3, 13, 15),
    (2, 3, 2, 3, 5),
]  # fmt: skip


def statistics(channels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "running_mean": ramp((channels,), -1, 2, dtype),
        "running_var": ramp((channels,), 0.25, 4, dtype),
    }


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        check_norm(
            "frozen_batch_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            bias if index % 5 else None,
            eps=(1e-5, 0.0, 0.5)[index % 3],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            **statistics(shape[1], wide),
        )


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 0231", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 5, 7), torch.float32), layout)
    check_norm("frozen_batch_norm", x, gradient=gradient, **statistics(17, torch.float32))


def test_nothing_changes_and_torch_agrees() -> None:
    x, own = values((3, 5, 7), torch.float64), statistics(5, torch.float64)
    before = {name: buffer.clone() for name, buffer in own.items()}
    weight, bias = torch.rand(5).double(), torch.rand(5).double()
    y = frozen_batch_norm(x, *own.values(), weight, bias, 0.1)
    torch.testing.assert_close(y, F.batch_norm(x, *own.values(), weight, bias, eps=0.1))
    for name, buffer in own.items():
        assert_same_bits(buffer, before[name], name)


def test_a_mean_far_from_zero() -> None:
    """The mean is subtracted first: one multiply-add with a folded bias would lose all digits."""
    mean, var = torch.tensor([1e3, -1e5, 1e6]), torch.tensor([1.0, 2.0, 0.5])
    for layout in ("contiguous", "channels_last", "strided"):
        x = lay_out(torch.randn(6, 3, 33) + mean.view(1, 3, 1), layout)
        check_norm("frozen_batch_norm", x, running_mean=mean, running_var=var)


def test_a_sample_does_not_feel_its_neighbours() -> None:
    own = statistics(17, torch.float32)
    for layout in ("contiguous", "channels_last"):
        x = values((5, 17, 7, 7), torch.float32)
        together = frozen_batch_norm(lay_out(x, layout), **own)
        for n in range(5):
            alone = frozen_batch_norm(lay_out(x[n : n + 1], layout), **own)
            assert_same_bits(alone, together[n : n + 1])


def test_saves_no_input_for_the_backward() -> None:
    """The derivative is weight/√(var + eps) whatever the input: only channels' numbers are kept."""
    saved: list[torch.Tensor] = []
    own = statistics(5, torch.float32)
    x = values((8, 5, 33), torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_batch_norm(x, **own, weight=torch.ones(5), bias=torch.zeros(5))
    y.sum().backward()
    assert x.grad is not None
    assert sum(t.numel() for t in saved) <= 4 * 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 3)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    own = statistics(3, parameter_dtype(dtype))
    for weight, bias in itertools.product((None, torch.ones_like(own["running_mean"])), repeat=2):
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        y = frozen_batch_norm(x, **own, weight=weight, bias=bias)
        assert y.shape == shape
        assert y.dtype is dtype
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_vmap_over_input_and_mask() -> None:
    x, mask = torch.randn(3, 4, 5, 6), torch.rand(3, 4, 1, 6) > 0.3
    mean, var = torch.randn(5), torch.rand(5) + 0.5

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return frozen_batch_norm(x, mean, var, mask=mask)

    mapped = torch.func.vmap(call)(x, mask)
    for index in range(3):
        assert torch.equal(mapped[index], call(x[index], mask[index]))

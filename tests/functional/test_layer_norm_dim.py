"""Layer norm over a dimension that is not the last: channels first, without a copy."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.device.functional import add_layer_norm, layer_norm
from tests.helpers import (
    ACTS,
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

# Channels and positions: 1, primes, lanes and blocks ± 1.
SHAPES = [
    (3, 1), (2, 17), (5, 64), (2, 3, 1), (3, 1, 7), (2, 15, 16), (2, 16, 17), (1, 65, 31),
    (2, 7, 513), (1, 512, 3), (1, 1025, 2), (2, 3, 4097), (2, 4097, 3), (17, 5, 9), (2, 96, 7, 7),
    (2, 33, 8, 8), (1, 3, 65, 63), (3, 130, 1, 5), (2, 3, 2, 3, 5), (1, 17, 3, 3, 3),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_channels_first(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    turn = SHAPES.index(shape)
    for index, layout in half_of(half, layouts_of(len(shape)), start=turn):
        check_norm(
            "layer_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            weight if index % 3 else None,
            bias if index % 5 else None,
            values(shape, dtype, seed=1) if index % 7 == 3 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            dim=1,
        )


@pytest.mark.parametrize("dim", range(-4, 4))
def test_any_dimension(dim: int) -> None:
    """`dim=d` is the same as moving d to the end and back."""
    shape = (3, 4, 5, 6)
    size = shape[dim]
    weight, bias = ramp((size,), -1, 2, torch.float64), ramp((size,), 1, -1, torch.float64)
    x = values(shape, torch.float64)
    for layout, act in itertools.product(layouts_of(4)[:8], (None, "gelu")):
        given = lay_out(x, layout)
        moved = layer_norm(given.movedim(dim, -1), (size,), weight, bias, act=act).movedim(-1, dim)
        y = layer_norm(given, (size,), weight, bias, act=act, dim=dim)
        torch.testing.assert_close(y, moved, rtol=1e-13, atol=1e-13)
        check_norm("layer_norm", given, weight, bias, act=act, dim=dim)


def test_the_last_dimension_by_name() -> None:
    x, weight = values((3, 4, 5), torch.float32), torch.rand(5)
    for dim in (-1, 2):
        assert_same_bits(layer_norm(x, 5, weight, dim=dim), layer_norm(x, 5, weight))


def test_channels_last_input_stays_channels_last() -> None:
    x = values((2, 8, 3, 5), torch.float32).to(memory_format=torch.channels_last)
    y, total = add_layer_norm(x, torch.ones_like(x), (8,), dim=1, act="relu")
    for result in (layer_norm(x, (8,), dim=1), y, total):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    y = layer_norm(x, (shape[1],), weight, dim=1)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) == 0

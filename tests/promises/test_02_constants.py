"""Promise 2: a constant becomes exactly the bias."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.device.functional import batch_norm
from tests.helpers import DTYPES, lay_out

CONSTANTS = (0.1, 0.3, 1.0, 3.14159, 1e3, 65503.9, 1e7, 1.7e9, 1e15, 1e22, 1e30)
SHAPES = [
    (2, 1),
    (3, 5),
    (1000, 3),
    (7, 3, 11),
    (2, 17, 4),
    (3, 64, 7, 7),
    (2, 2, 33, 31),
    (1, 3, 4097),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constant_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    bias = torch.linspace(-2, 3, shape[1], dtype=parameter_dtype)
    expected = bias.to(dtype).view(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
    for constant, sign, layout in itertools.product(
        CONSTANTS, (1, -1), ("contiguous", "channels_last", "strided")
    ):
        if constant > torch.finfo(dtype).max:
            continue
        x = lay_out(torch.full(shape, sign * constant, dtype=dtype), layout).requires_grad_()
        y = batch_norm(x, None, None, training=True)
        assert torch.count_nonzero(y) == 0, (constant, layout)
        y = batch_norm(x, None, None, None, bias, True)
        assert torch.equal(y, expected), (constant, layout)
        y = batch_norm(x, None, None, torch.full_like(bias, 1e3), bias, True, act="relu")
        assert torch.equal(y, expected.relu()), (constant, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_constant_channel_among_others(layout: str) -> None:
    x = torch.randn(5, 4, 37)
    x[:, 2] = 1e7 + 1
    y = batch_norm(lay_out(x, layout), None, None, training=True)
    assert torch.count_nonzero(y[:, 2]) == 0
    assert torch.count_nonzero(y[:, 1]) == y[:, 1].numel()


def test_running_variance_of_a_constant_is_zero() -> None:
    for constant in (0.1, 1e7, 1e15):
        mean, var = torch.zeros(3), torch.ones(3)
        x = torch.full((50, 3, 7), constant)
        batch_norm(x, mean, var, training=True, momentum=1.0)
        assert torch.equal(mean, x[0, :, 0])
        assert torch.equal(var, torch.zeros(3))

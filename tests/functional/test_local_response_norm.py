"""Local response norm against the float64 reference: windows, shapes, dtypes, layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.device.functional import local_response_norm
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
from tests.norm_helpers import check_norm

# Channels below, at and above the window; positions of 1, primes, lanes and chunks ± 1.
SHAPES = [
    (2, 1, 1), (3, 2, 5), (2, 3, 16), (1, 5, 17), (2, 7, 15), (3, 16, 3), (2, 17, 1), (1, 33, 9),
    (2, 65, 7), (1, 130, 2), (2, 4, 511), (1, 3, 513), (1, 2, 4097), (2, 9, 7, 7), (1, 64, 3, 5),
    (2, 5, 1, 33), (3, 6, 8, 8), (2, 4, 2, 3, 5), (1, 17, 3, 1, 2),
]  # fmt: skip
WINDOWS = (1, 2, 3, 4, 5, 8, 11)
# Those of AlexNet, where the sum hardly counts; one where it does; ones without a constant.
SETTINGS = (
    {"alpha": 1e-4, "beta": 0.75, "k": 2.0},
    {"alpha": 1.0, "beta": 0.75, "k": 1.0},
    {"alpha": 2.0, "beta": 0.5, "k": 0.5},
    {"alpha": 0.5, "beta": 1.0, "k": 1.0},
    {"alpha": 0.3, "beta": 1.7, "k": 0.1},
    {"alpha": 0.7, "beta": -0.5, "k": 1.0},
)


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with windows and settings taking turns."""
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        check_norm(
            "local_response_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            size=WINDOWS[index % len(WINDOWS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            **SETTINGS[index % len(SETTINGS)],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*range(1, 14), 40])
def test_every_window(size: int, dtype: torch.dtype) -> None:
    """Windows wider than all channels too; every setting."""
    for settings, layout in itertools.product(SETTINGS, ("contiguous", "channels_last")):
        x = lay_out(values((2, 9, 4, 5), dtype), layout)
        check_norm("local_response_norm", x, size=size, **settings)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_the_window_is_torchs(size: int) -> None:
    """size // 2 channels below and (size - 1) // 2 above; alpha is divided by the size."""
    for shape in ((2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)):
        x = values(shape, torch.float64)
        ours = local_response_norm(x, size, 0.7, 0.6, 1.3)
        torch.testing.assert_close(ours, F.local_response_norm(x, size, 0.7, 0.6, 1.3))
    torch.testing.assert_close(local_response_norm(x, size), F.local_response_norm(x, size))


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 0231", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 1023"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 5, 7), torch.float32), layout)
    check_norm("local_response_norm", x, size=5, alpha=0.5, gradient=gradient)


def test_a_large_neighbour_does_not_stay_in_the_sum() -> None:
    """A window that slides by adding and subtracting would keep the rounding of 1e6² for good."""
    x = torch.full((1, 40, 3), 1e-3)
    x[:, 3] = 1e6
    for layout in ("contiguous", "channels_last"):
        check_norm("local_response_norm", lay_out(x, layout), size=3, alpha=1.0, k=1e-3)


def test_channels_last_input_stays_channels_last() -> None:
    x = values((2, 8, 3, 5), torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    y = local_response_norm(x, 5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_window_of_one_without_alpha_is_a_scale() -> None:
    x = values((2, 3, 4), torch.float32)
    assert_same_bits(local_response_norm(x, 1, 0.0, 1.0, 2.0), x / 2)
    assert_same_bits(local_response_norm(x, 3, 0.0, 0.75, 1.0), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 2, 3), (2, 0, 4)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    y = local_response_norm(x, 3)
    assert y.shape == shape
    assert y.dtype is dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape

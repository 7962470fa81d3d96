"""RMS norm against the float64 reference: shapes, dtypes, layouts, and what may be absent."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from normally.reference import CASTINGS
from tests.device.functional import rms_norm
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

# Row lengths: 1, primes, and what kernels block by (lanes of 4 to 64, chunks of 512 to 4096) with
# one less and one more; numbers of rows around what is shared between threads.
SHAPES = [
    (1, 1), (5, 1), (3, 2), (17, 7), (5, 15), (33, 16), (3, 17), (7, 31), (65, 33), (4, 63),
    (2, 64), (3, 65), (9, 127), (1, 511), (3, 512), (2, 513), (5, 768), (2, 1023), (1, 1024),
    (3, 1025), (2, 4095), (1, 4096), (2, 4097), (1, 8209), (1031, 3), (257, 16), (3, 5, 1),
    (2, 3, 13), (4, 16, 15), (3, 1, 64), (2, 129, 5), (2, 3, 4, 5), (1, 64, 2, 17), (2, 17, 1, 31),
    (3, 2, 7, 49), (2, 3, 2, 3, 5), (1, 2, 3, 4, 65),
]  # fmt: skip


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Each layout of a shape, with the castings and the weight taking turns."""
    wide = parameter_dtype(dtype)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        size = shape[-1 - index % (len(shape) - 1) :]  # the last, the last two, …; never all
        check_norm(
            "rms_norm",
            lay_out(values(shape, dtype, seed=index), layout),
            ramp(size, -1.5, 1.6, wide) if index % 4 else None,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            normalized_shape=size,
            casting=CASTINGS[index % 3],
            zero_centered_weight=index % 5 < 2,
            eps=(None, 1e-6, 0.5)[index % 3],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count"),
    [((7,), 1), ((4097,), 1), ((3, 5), 2), ((65, 63), 2), ((2, 3, 4), 2), ((4, 3, 5, 7), 3),
     ((4, 3, 5, 7), 4), ((2, 16, 9, 9), 3), ((2, 1, 64, 1), 3), ((2, 3, 4, 5, 6), 4)],
    ids=str,
)  # fmt: skip
def test_normalized_shape_of_several_dims(
    shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> None:
    """Up to the whole input, of which there is one sample then."""
    size = shape[-count:]
    weight = ramp(size, -1, 2, parameter_dtype(dtype))
    base = values((1, *shape), dtype)[0] if len(shape) == 1 else values(shape, dtype)
    layouts = layouts_of(len(shape)) if len(shape) > 1 else ("contiguous",)
    for layout in layouts:
        check_norm("rms_norm", lay_out(base, layout), weight, normalized_shape=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("casting", CASTINGS)
def test_every_combination(casting: str, zero_centered: bool, dtype: torch.dtype) -> None:
    """With and without a weight, of float32 or of the input's dtype."""
    options = {"casting": casting, "zero_centered_weight": zero_centered}
    for wide, layout in itertools.product(
        {parameter_dtype(dtype), dtype}, ("contiguous", "order 201", "strided")
    ):
        x = lay_out(values((3, 5, 19), dtype), layout)
        residual = values((3, 5, 19), dtype, seed=1)
        for weight in (None, ramp((19,), -1.5, 2, wide)):
            check_norm("rms_norm", x, weight, None, None, **options)
            check_norm("rms_norm", x, weight, None, residual, **options)


@pytest.mark.parametrize("gradient", ["expanded batch", "strided", "order 201", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 102"])
def test_gradients_in_any_layout(layout: str, gradient: str) -> None:
    x = lay_out(values((4, 17, 33), torch.float32), layout)
    check_norm("rms_norm", x, ramp((33,), -1, 2, torch.float32), gradient=gradient)


def test_gradient_of_a_sum() -> None:
    """`y.sum().backward()` hands in one number with strides of 0."""
    for layout in ("contiguous", "channels_last"):
        x = lay_out(values((3, 5, 4, 6), torch.float32), layout)
        results = []
        for expand in (True, False):
            leaf = x.detach().requires_grad_()
            y = rms_norm(leaf, (6,))
            ones = torch.ones((), dtype=y.dtype).expand(y.shape)
            results.append(torch.autograd.grad(y, leaf, ones if expand else ones.contiguous())[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_none_is_torchs(dtype: torch.dtype) -> None:
    """The machine epsilon of float32, also for half inputs; rows near it tell the difference."""
    eps = torch.finfo(parameter_dtype(dtype)).eps
    # At or below eps in x²: what is added decides about the size of the result.
    x = values((4, 16), dtype) * torch.tensor([1.0, 1e-2, 1e-4, 1e-8], dtype=dtype)[:, None]
    assert_same_bits(rms_norm(x, (16,)), rms_norm(x, (16,), eps=eps))
    # One rounding to the dtype on either side, and a few of float32.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.0}
    if dtype is torch.float32:
        tolerance["rtol"] = 1e-6
    torch.testing.assert_close(rms_norm(x, (16,)), F.rms_norm(x, (16,)), **tolerance)


def test_torchs_positional_arguments() -> None:
    x, weight = values((3, 4, 5), torch.float64), torch.rand(4, 5).double()
    ours = rms_norm(x, (4, 5), weight, 0.1)
    torch.testing.assert_close(ours, F.rms_norm(x, (4, 5), weight, 0.1))
    assert_same_bits(rms_norm(x, 5), rms_norm(x, [5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"), [((0, 5), (5,)), ((3, 0), (0,)), ((2, 0, 5), (5,)), ((2, 3, 0), (3, 0))]
)
def test_empty(shape: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight = torch.ones(size, dtype=parameter_dtype(dtype), requires_grad=True)
    for casting in CASTINGS:
        y = rms_norm(x, size, weight, casting=casting)
        assert y.shape == shape
        assert y.dtype is dtype
        for gradient, leaf in zip(
            torch.autograd.grad(y.sum(), [x, weight]), (x, weight), strict=True
        ):
            assert gradient.shape == leaf.shape
            assert gradient.dtype is leaf.dtype
            assert torch.count_nonzero(gradient) == 0


def test_rows_of_zeros() -> None:
    """0/√eps is 0, and the gradient is that of a product with 1/√eps."""
    x = torch.zeros(3, 17, requires_grad=True)
    y = rms_norm(x, (17,), eps=1e-6)
    assert torch.count_nonzero(y) == 0
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, torch.full_like(x, 1e3), rtol=1e-6, atol=0)

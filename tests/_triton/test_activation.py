"""The activations of the GPU kernels and their derivatives, against the reference in float64."""

# ruff: noqa: N803 (Triton's constants are capitals)

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from normally._triton.activation import activate, slope
from normally.reference.activation import ACTIVATIONS, DEFAULT_ACT_PARAM, DERIVATIVES
from tests.device import DEVICE

NAMES = (None, *ACTIVATIONS)
DTYPES = (torch.float32, torch.float64)

# Of numbers that are at most max(1, |result|): in float32 four roundings of 6e-8, and where a GPU
# divides or takes a power of two it is within two units of 1.2e-7. In float64 all are roundings.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-14}


@triton.jit
def _activation_kernel(
    y_ptr,  # (n,), as dy_ptr and z_ptr
    dy_ptr,
    z_ptr,
    n,
    ACT_PARAM: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, activate(z, ACT_PARAM, ACT), mask=i < n)
    tl.store(dy_ptr + i, slope(z, ACT_PARAM, ACT), mask=i < n)


def _run(z: Tensor, act: str | None, act_param: float | None = None) -> tuple[Tensor, Tensor]:
    z = z.to(DEVICE)
    y, dy = torch.full_like(z, 7), torch.full_like(z, 7)
    param = DEFAULT_ACT_PARAM.get(act or "", 0.0) if act_param is None else act_param
    block = triton.next_power_of_2(z.numel())
    _activation_kernel[(1,)](y, dy, z, z.numel(), param, NAMES.index(act), block)
    return y.cpu(), dy.cpu()


def _expected(z: Tensor, act: str | None, act_param: float | None = None) -> tuple[Tensor, Tensor]:
    """In float64."""
    z = z.double()
    if act is None:
        return z, torch.ones_like(z)
    param = DEFAULT_ACT_PARAM.get(act, 0.0) if act_param is None else act_param
    return ACTIVATIONS[act](z, param), DERIVATIVES[act](z, param)


def _assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype is dtype
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= TOLERANCE[dtype]


def _grid(dtype: torch.dtype) -> Tensor:
    """Values over all magnitudes, of both signs, with every kink and its neighbours."""
    size = torch.cat([torch.linspace(0, 12, 801), torch.logspace(-40, 4, 200)]).to(dtype)
    kinks = torch.tensor([0, 1e-8, 0.25, 0.5, 3, 6, 20, 40, 1e30, 3.4e38], dtype=dtype)
    inf = torch.full_like(kinks, math.inf)
    near = torch.cat([kinks, kinks.nextafter(inf), kinks.nextafter(-inf)])
    return torch.cat([size, near, -size, -near])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", NAMES)
def test_values_and_derivatives(act: str | None, dtype: torch.dtype) -> None:
    z = _grid(dtype)
    z = z[z.isfinite()]
    for actual, expected in zip(_run(z, act), _expected(z, act), strict=True):
        _assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", NAMES)
def test_the_largest_numbers_give_finite_results(act: str | None, dtype: torch.dtype) -> None:
    # The reference itself gives NaN for some: their limits are known.
    largest = torch.finfo(dtype).max
    z = torch.tensor([largest, largest / 7], dtype=dtype)
    bounds = {"relu6": 6.0, "hardsigmoid": 1.0, "sigmoid": 1.0, "tanh": 1.0}
    y, dy = _run(z, act)
    torch.testing.assert_close(y, torch.full_like(z, bounds[act]) if act in bounds else z)
    torch.testing.assert_close(dy, torch.full_like(z, float(act not in bounds)))

    factor = {None: 1.0, "leaky_relu": 0.01}.get(act, 0.0)
    bound = -1.0 if act in ("elu", "tanh") else 0.0
    y, dy = _run(-z, act)
    torch.testing.assert_close(y, -z * factor + bound)
    torch.testing.assert_close(dy, torch.full_like(z, factor))


# inf · 0 is what the reference computes there, too.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", NAMES)
def test_nan_and_infinity_as_in_the_reference(act: str | None, dtype: torch.dtype) -> None:
    z = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    results = zip(_run(z, act), _expected(z, act), strict=True)
    for actual, expected in results:
        torch.testing.assert_close(actual, expected.to(dtype), equal_nan=True)
    assert _run(z, act)[0][0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["elu", "tanh", "silu", "gelu", "gelu_tanh", "hardswish"])
def test_small_numbers_keep_all_their_digits(act: str, dtype: torch.dtype) -> None:
    size = torch.logspace(-30, -0.1, 300).to(dtype)
    z = torch.cat([size, -size])
    actual, expected = _run(z, act)[0].double(), _expected(z, act)[0]
    # Twice as much: the error is of numbers up to 1/2 where the result is z times one of them.
    tolerance = 2 * TOLERANCE[dtype]
    assert ((actual - expected).abs() <= tolerance * expected.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_param", [-0.1, 0.0, 0.1, 1.0, 3.7])
@pytest.mark.parametrize("act", sorted(DEFAULT_ACT_PARAM))
def test_the_parameter_has_the_precision_of_z(
    act: str, act_param: float, dtype: torch.dtype
) -> None:
    z = torch.linspace(-4, 4, 65, dtype=dtype)
    results = zip(_run(z, act, act_param), _expected(z, act, act_param), strict=True)
    for actual, expected in results:
        _assert_close(actual, expected, dtype)

"""Activations fused into the norms: at special values, in the tails and at their kinks.

A weight of 0 makes z exactly the bias, so what comes out is act(bias) and what comes back to the
bias is act'(bias) times the number of elements that share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.helpers import KINKS, lay_out, rounding, values

#: (input, weight, bias, act, act_param) -> output, a parameter of n being that of dimension 1 or 2.
Function = Callable[[Tensor, Tensor, Tensor, "str | None", "float | None"], Tensor]


def through(
    function: Function,
    z: Tensor,
    act: str | None,
    dtype: torch.dtype,
    layout: str = "contiguous",
    act_param: float | None = None,
    *,
    last: bool,
) -> Tensor:
    """act(z) as a norm of `dtype` makes it: z is a bias, along the last or the channels."""
    n = z.shape[0]
    x = lay_out(values((3, 4, n) if last else (3, n, 4), dtype), layout)
    return function(x, torch.zeros_like(z), z, act, act_param)


def parameter(z: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(z, dtype=torch.float64 if dtype is torch.float64 else torch.float32)


def beside(z: Tensor, y: Tensor, last: bool) -> Tensor:
    return z.expand(y.shape) if last else z.view(-1, 1).expand(y.shape)


def check_special_values(
    function: Function, act: str | None, dtype: torch.dtype, layout: str, *, last: bool
) -> None:
    """NaN and infinity pass as in torch."""
    # 67 values: full vectors of any width and a tail, each with every special value.
    special = [math.nan, math.inf, -math.inf, -math.nan, 0.0, -0.0, 1.0, -1.0]
    z = parameter((special * 9)[:67], dtype)
    y = through(function, z, act, dtype, layout, last=last)
    # torch in float64: its float32 vector code gives NaN for gelu(inf), its scalar code inf.
    expected = reference.activate(z.double(), act).to(dtype)
    torch.testing.assert_close(y, beside(expected, y, last), equal_nan=True)


def check_large_arguments(
    function: Function, act: str | None, dtype: torch.dtype, *, last: bool
) -> None:
    """They neither overflow nor lose the tail."""
    numbers = [-200.0, -104.0, -88.0, -50.0, -20.0, -9.0, 9.0, 20.0, 88.0, 89.0, 200.0]
    z = parameter(numbers * 7, dtype).requires_grad_()
    wide = z.detach().double().requires_grad_()
    expected = reference.activate(wide, act)
    y = through(function, z, act, dtype, last=last)
    # In the tails e^z itself is rounded: relative to 1 for what saturates, |z| for the rest; the
    # smallest results of silu and gelu are below 1e-7 and only need to be small.
    tolerance = {"rtol": 1e-5 if dtype.itemsize > 2 else 1e-2, "atol": 2e-6}
    torch.testing.assert_close(y.double(), beside(expected, y, last), **tolerance)
    (gradient,) = torch.autograd.grad(y.sum(), z)
    (wanted,) = torch.autograd.grad(expected.sum() * 12, wide)  # twelve elements share a bias
    tolerance["atol"] *= 12
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)


def check_kink(
    function: Function, act: str, dtype: torch.dtype, layout: str, *, last: bool
) -> None:
    """On each kink, and one float to either side of it, the derivative is torch's."""
    if dtype is torch.float64:
        around = [
            math.nextafter(kink, side) if side else kink
            for kink in KINKS[act]
            for side in (-math.inf, 0.0, math.inf)
        ]
    else:  # neighbours in float32, where half inputs compute
        around = [
            float(torch.nextafter(torch.tensor(kink), torch.tensor(kink + side)))
            for kink in KINKS[act]
            for side in (-1.0, 0.0, 1.0)
        ]
    z = parameter(around * 5, dtype).requires_grad_()
    y = through(function, z, act, dtype, layout, last=last)
    plain = z.detach().clone().requires_grad_()
    wanted = getattr(F, act)(plain)
    # On the kink itself nothing rounds; beside it hardswish and elu may, by a unit or two.
    torch.testing.assert_close(
        y, beside(wanted, y, last).to(dtype), rtol=4 * rounding(dtype), atol=1e-45
    )
    (gradient,) = torch.autograd.grad(y, z, torch.ones_like(y))
    (slope,) = torch.autograd.grad(wanted.sum(), plain)
    # e^z, z/3 + 1/2 and the slope 0.01 round; a wrong side would be off by 1/6 or more.
    # (torch's 1/6 for hardsigmoid is a float32 constant in float64 too: 3e-8.)
    tolerance = max(4 * rounding(gradient.dtype), 4e-8)
    torch.testing.assert_close(gradient, 12 * slope, rtol=tolerance, atol=0)


def check_parameters(function: Function, act: str, layout: str, *, last: bool) -> None:
    """`act_param` is leaky_relu's slope and elu's alpha, of any sign; without one torch's."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z = parameter([-3.0, -1.0, -0.25, 0.0, 0.5, 2.0, 7.0] * 5, dtype)
        for given in (None, -0.5, 0.0, 0.2, 1.0, 2.5):
            leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
            y = through(function, leaf, act, dtype, layout, given, last=last)
            wanted = reference.activate(wide, act, given)
            tolerance = 4 * rounding(dtype) + 4 * rounding(z.dtype)
            torch.testing.assert_close(
                y.double(), beside(wanted, y, last), rtol=tolerance, atol=tolerance
            )
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            (slope,) = torch.autograd.grad(wanted.sum(), wide)
            tolerance = 16 * rounding(z.dtype)
            torch.testing.assert_close(
                gradient.double(), 12 * slope, rtol=tolerance, atol=tolerance
            )

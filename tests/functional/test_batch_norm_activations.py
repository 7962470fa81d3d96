"""Fused activations equal torch's: at their kinks, at NaN and infinity, and with a parameter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.device.functional import batch_norm
from tests.helpers import ACTS, DTYPES, KINKS, check_batch_norm, lay_out, rounding, values


def passed_through(z: Tensor, act: str | None, act_param: float | None = None) -> Tensor:
    """act(z) through a batch norm in evaluation that changes nothing: mean 0, variance 1, eps 0."""
    x = z.view(1, 1, -1)
    dtype = torch.float64 if z.dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    return batch_norm(x, mean, var, eps=0.0, act=act, act_param=act_param).view(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity_pass_as_in_torch(act: str | None, dtype: torch.dtype) -> None:
    # 67 values: full vectors of any width and a tail, each with every special value.
    special = torch.tensor([math.nan, math.inf, -math.inf, -math.nan, 0.0, -0.0, 1.0, -1.0])
    z = special.repeat(9)[:67].to(dtype)
    # torch in float64: its float32 vector code gives NaN for gelu(inf), its scalar code inf.
    expected = reference.activate(z.double(), act).to(dtype)
    torch.testing.assert_close(passed_through(z, act), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_large_arguments_neither_overflow_nor_lose_the_tail(
    act: str | None, dtype: torch.dtype
) -> None:
    z = torch.tensor([-200.0, -104.0, -88.0, -50.0, -20.0, -9.0, 9.0, 20.0, 88.0, 89.0, 200.0])
    z = z.repeat(7).to(dtype).requires_grad_()
    wide = z.detach().double().requires_grad_()
    expected = reference.activate(wide, act)
    # In the tails e^z itself is rounded: relative to 1 for what saturates, |z| for the rest; the
    # smallest results of silu and gelu are below 1e-7 and only need to be small.
    y = passed_through(z, act)
    tolerance = {"rtol": 1e-5 if dtype.itemsize > 2 else 1e-2, "atol": 2e-6}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    (gradient,) = torch.autograd.grad(y.sum(), z)
    (wanted,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", KINKS)
def test_at_the_kink_the_derivative_is_torchs(
    act: str, layout: str, with_residual: bool, dtype: torch.dtype
) -> None:
    """weight 0 makes z exactly the bias: on each kink, and one float to either side of it."""
    around = [
        math.nextafter(kink, side) if side else kink
        for kink in KINKS[act]
        for side in (-math.inf, 0.0, math.inf)
    ]
    if dtype is not torch.float64:  # neighbours in float32, where half inputs compute
        around = [
            float(torch.nextafter(torch.tensor(kink), torch.tensor(kink + side)))
            for kink in KINKS[act]
            for side in (-1.0, 0.0, 1.0)
        ]
    channels = len(around)
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    bias = torch.tensor(around, dtype=parameter_dtype)
    weight = torch.zeros(channels, dtype=parameter_dtype)
    x = lay_out(values((3, channels, 21), dtype), layout)
    residual = torch.zeros_like(x).requires_grad_() if with_residual else None
    leaf = bias.clone().requires_grad_()
    y = batch_norm(x, None, None, weight, leaf, True, act=act, residual=residual)
    z = bias.view(1, -1, 1).expand(x.shape).clone().requires_grad_()
    wanted = getattr(F, act)(z)
    # On the kink itself nothing rounds; beside it hardswish and elu may, by a unit or two.
    torch.testing.assert_close(y, wanted.to(dtype), rtol=4 * rounding(dtype), atol=1e-45)
    g = torch.ones_like(y)
    (slope,) = torch.autograd.grad(wanted, z, g.to(wanted.dtype))
    if residual is None:
        (gradient,) = torch.autograd.grad(y, leaf, g)
        expected = slope.double().sum((0, 2)).to(leaf.dtype)
    else:
        (gradient,) = torch.autograd.grad(y, residual, g)
        expected = slope.to(dtype)
    # e^z, z/3 + 1/2 and the slope 0.01 round; a wrong side would be off by 1/6 or more.
    # (torch's 1/6 for hardsigmoid is a float32 constant in float64 too: 3e-8.)
    tolerance = max(4 * rounding(gradient.dtype), 4e-8)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("param", [-0.5, 0.0, 0.2, 1.0, 2.5])
@pytest.mark.parametrize("act", ["leaky_relu", "elu"])
def test_parameters(act: str, param: float) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            x = lay_out(values((4, 5, 33), dtype), layout)
            check_batch_norm(x, act=act, act_param=param)
            check_batch_norm(x, residual=x.flip(0), act=act, act_param=param)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_mask_comes_from_z_and_not_from_the_rounded_output(layout: str) -> None:
    """A z too small for float16 is 0 in the output, yet relu's derivative there is 1."""
    bias = torch.tensor([1e-9, -1e-9])
    x = lay_out(torch.randn(3, 2, 19).half(), layout)
    for residual in (None, torch.zeros_like(x)):
        leaf = bias.clone().requires_grad_()
        y = batch_norm(x, None, None, torch.zeros(2), leaf, True, act="relu", residual=residual)
        assert not y.any()
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [57.0, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saturated_outputs_keep_the_gradient_of_z(layout: str) -> None:
    """leaky_relu with a negative slope is positive on both sides: y alone cannot tell them."""
    x = lay_out(values((5, 3, 17), torch.float32), layout)
    for residual in (None, x.flip(0)):
        check_batch_norm(x, residual=residual, act="leaky_relu", act_param=-0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_lets_the_gradient_of_a_nan_through_as_torch_does(
    layout: str, dtype: torch.dtype
) -> None:
    """A derivative of 0 there would hide the NaN from the weights and from whoever looks for it."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(3, dtype=wide), torch.ones(3, dtype=wide)
    x = values((4, 3, 21), dtype)
    x[:, 1, ::2] = math.nan
    for residual in (None, torch.zeros_like(x)):
        bias = torch.zeros(3, dtype=wide, requires_grad=True)
        y = batch_norm(
            lay_out(x, layout), mean, var, None, bias, act="relu", residual=residual, eps=0.0
        )
        (gradient,) = torch.autograd.grad(y, bias, torch.ones_like(y))
        expected = (~(x <= 0)).sum((0, 2))
        assert gradient.tolist() == expected.tolist()
        plain = x.double().requires_grad_()
        assert torch.equal(
            torch.autograd.grad(F.relu(plain).sum(), plain)[0].sum((0, 2)), expected.double()
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_in_evaluation_the_gradient_does_not_depend_on_the_input(layout: str) -> None:
    """dx = dy · weight / √(var + eps): finite where x is not, as torch has it."""
    x = values((4, 3, 21), torch.float32)
    x[0, 1, 3], x[1, 1, 4], x[2, 1, 20] = math.nan, math.inf, -math.inf
    mean, var, weight = torch.zeros(3), torch.tensor([1.0, 4.0, 0.25]), torch.full((3,), 2.0)
    gradients = []
    for function in (batch_norm, F.batch_norm):
        leaf = lay_out(x, layout).requires_grad_()
        y = function(leaf, mean, var, weight)
        gradients.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
    torch.testing.assert_close(*gradients)

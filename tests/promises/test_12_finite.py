"""Promise 12: finite in, finite out, and right."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from normally import reference
from tests.device.functional import batch_norm
from tests.helpers import arithmetic, lay_out, rounding

LAYOUTS = ("contiguous", "channels_last", "strided")
SHAPES = [(64, 3), (5, 4, 33), (3, 17, 7, 7), (33, 5, 4), (2, 2, 4099)]


def check(x: Tensor, g: Tensor, act: str | None = None) -> None:
    """Forward and backward against float64, each relative to the largest of its kind."""
    weight = torch.linspace(-1.5, 2, x.shape[1])
    bias = torch.linspace(1, -1, x.shape[1])
    residual, g = torch.randn(x.shape).to(x.dtype), g.to(x.dtype)
    for other in (None, residual):
        leaves = [
            None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, other)
        ]
        y = batch_norm(
            leaves[0], None, None, leaves[1], leaves[2], True, act=act, residual=leaves[3]
        )
        wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
        expected = reference.batch_norm(
            wide[0], weight=wide[1], bias=wide[2], residual=wide[3], act=act
        )
        within("output", y, expected)
        present = [leaf for leaf in leaves if leaf is not None]
        actual = torch.autograd.grad(y, present, g)
        wanted = torch.autograd.grad(expected, [t for t in wide if t is not None], g.double())
        for index, (a, b) in enumerate(zip(actual, wanted, strict=True)):
            within(f"gradient {index}", a, b)


def within(what: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all(), what
    expected = expected.detach()
    largest = float(expected.abs().max())
    # Sums of up to 8198 terms of both signs: 16 times what one term may be off by.
    bound = (
        16 * arithmetic(torch.float32) * largest
        + rounding(actual.dtype) * expected.abs()
        + torch.finfo(actual.dtype).smallest_normal * rounding(actual.dtype)
    )
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"{what}: {error.max():.3e} of {largest:.3e}"


@pytest.mark.parametrize("scale", [1e30, 1e37, 1e25, 1e19, 1e18, 1e-18, 1e-20, 1e-30, 1e-38])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    base = torch.randn(shape)
    for layout, mean in itertools.product(LAYOUTS, (0.0, 3.0)):
        x = lay_out(((base + mean) * scale).to(dtype), layout)
        check(x, torch.randn(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_largest_float32(layout: str) -> None:
    """The sum of two of these is infinite in float32, and so is their difference."""
    largest = torch.finfo(torch.float32).max
    x = torch.where(torch.rand(9, 3, 35) < 0.5, -largest, largest)
    check(lay_out(x, layout), torch.randn(9, 3, 35))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_near_its_largest(shape: tuple[int, ...]) -> None:
    for layout, sign in itertools.product(LAYOUTS, (1, -1)):
        x = (sign * (60_000 + 1_500 * torch.randn(shape))).clamp(-65504, 65504).half()
        check(lay_out(x, layout), torch.randn(shape))
        both = torch.where(torch.rand(shape) < 0.5, -60_000, 60_000).half()
        check(lay_out(both, layout), torch.randn(shape))


@pytest.mark.parametrize("act", ["relu", "silu", "gelu", "sigmoid"])
def test_with_an_activation(act: str) -> None:
    for layout, scale in itertools.product(LAYOUTS, (1e30, 1e-30)):
        x = torch.randn(5, 4, 33) * scale
        # A kink would be met at random; the smooth ones are compared everywhere.
        if act != "relu":
            check(lay_out(x, layout), torch.randn(5, 4, 33), act)
        else:
            y = batch_norm(lay_out(x, layout), None, None, training=True, act=act)
            within("output", y, reference.batch_norm(x.double(), act=act))


def test_one_extreme_channel_among_ordinary_ones() -> None:
    x = torch.randn(6, 4, 40) * torch.tensor([1e30, 1.0, 1e-30, 1e3]).view(1, 4, 1)
    for layout in LAYOUTS:
        y = batch_norm(lay_out(x, layout), None, None, training=True)
        expected = reference.batch_norm(x.double())
        for channel in range(4):
            within(f"channel {channel}", y[:, channel], expected[:, channel])


def test_evaluation() -> None:
    x = torch.randn(6, 4, 40) * 1e30
    mean, var = torch.full((4,), 1e29), torch.full((4,), 1e38)
    for layout in LAYOUTS:
        y = batch_norm(lay_out(x, layout), mean, var)
        within("output", y, reference.batch_norm(x.double(), mean.double(), var.double()))


@pytest.mark.parametrize("scale", [1e150, 1e-160, 1e200, 1e300, 1e-300])
def test_float64(scale: float) -> None:
    """Beyond 1e154 a float64 square is infinite and the output 0: finite, but no longer right."""
    base = torch.randn(5, 4, 33, dtype=torch.float64)
    for layout in LAYOUTS:
        y = batch_norm(lay_out(base * scale, layout), None, None, training=True)
        assert y.isfinite().all()
        if scale == 1e150:
            expected = reference.batch_norm(base, eps=1e-300)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        elif scale < 1:
            torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-150)

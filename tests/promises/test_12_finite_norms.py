"""Promise 12 for the norms without running statistics: finite in, finite out, and right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import reference
from tests import norms
from tests.device import functional
from tests.helpers import arithmetic, lay_out, rounding
from tests.norms import Norm, Shape

LAYOUTS = ("contiguous", "channels_last", "strided")
SCALES = (1e30, 1e37, 1e25, 1e19, 1e18, 1e-18, 1e-20, 1e-30, 1e-38)


def spread(norm: Norm) -> list[Shape]:
    """Shapes with several values a group: one alone has a gradient of 0, all of it cancellation."""
    return [shape for shape in norm.shapes if norm.rows(torch.empty(shape)).shape[1] > 1]


CASES = [case for case in norms.cases(norms.ALL) if case.values[1] in spread(case.values[0])]


def check(norm: Norm, x: Tensor, g: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """Forward and backward against float64, each relative to the largest of its kind."""
    given = (x, *norm.parameters(tuple(x.shape), x.dtype))
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    g = g.to(x.dtype)
    y, expected = (
        call(*t, mask=mask, **options) for call, t in ((norm.ours, leaves), (norm.formula, wide))
    )
    # llama rounds to a half dtype once more, before the weight.
    twice = torch.finfo(x.dtype).eps if "llama" in norm.name else 0.0
    within("output", y, expected, twice)
    actual = torch.autograd.grad(y, [t for t in leaves if t is not None], g)
    wanted = torch.autograd.grad(expected, [t for t in wide if t is not None], g.double())
    for index, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        within(f"gradient {index}", a, b, twice)


def within(what: str, actual: Tensor, expected: Tensor, twice: float = 0.0) -> None:
    assert actual.isfinite().all(), what
    expected = expected.detach()
    largest = float(expected.abs().max())
    # Sums of up to 8198 terms of both signs: 16 times what one term may be off by.
    bound = (
        (16 * arithmetic(torch.float32) + twice) * largest
        + rounding(actual.dtype) * expected.abs()
        + torch.finfo(actual.dtype).smallest_normal * rounding(actual.dtype)
    )
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"{what}: {error.max():.3e} of {largest:.3e}"


@pytest.mark.parametrize(("norm", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(dtype: torch.dtype, norm: Norm, shape: Shape) -> None:
    base, g = torch.randn(shape), torch.randn(shape)
    for scale, layout, mean in itertools.product(SCALES, LAYOUTS, (0.0, 3.0)):
        check(norm, lay_out(((base + mean) * scale).to(dtype), layout), g)


@pytest.mark.parametrize("norm", norms.ALL, ids=str)
def test_extreme_scales_with_a_mask(norm: Norm) -> None:
    for shape, scale in itertools.product(spread(norm), (1e30, 1e-30)):
        x = (torch.randn(shape) + 1) * scale
        for mask in (norm.mask(shape), norm.mask(shape, whole_rows=True)):
            for layout in LAYOUTS:
                check(norm, lay_out(x, layout), torch.randn(shape), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", norms.ALL, ids=str)
def test_largest_float32(norm: Norm, layout: str) -> None:
    """The sum of two of these is infinite in float32, and so is their difference."""
    largest = torch.finfo(torch.float32).max
    for shape in spread(norm):
        x = torch.where(torch.rand(shape) < 0.5, -largest, largest)
        check(norm, lay_out(x, layout), torch.randn(shape))


@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_float16_near_its_largest(norm: Norm, shape: Shape) -> None:
    for layout, sign in itertools.product(LAYOUTS, (1, -1)):
        x = (sign * (60_000 + 1_500 * torch.randn(shape))).clamp(-65504, 65504).half()
        check(norm, lay_out(x, layout), torch.randn(shape))
        both = torch.where(torch.rand(shape) < 0.5, -60_000, 60_000).half()
        check(norm, lay_out(both, layout), torch.randn(shape))


@pytest.mark.parametrize("act", ["silu", "gelu", "sigmoid"])
@pytest.mark.parametrize("norm", [norms.LAYER, norms.LAYER_FIRST, norms.GROUP], ids=str)
def test_with_an_activation(norm: Norm, act: str) -> None:
    for shape, layout, scale in itertools.product(spread(norm), LAYOUTS, (1e30, 1e-30)):
        check(norm, lay_out(torch.randn(shape) * scale, layout), torch.randn(shape), act=act)


@pytest.mark.parametrize("norm", [n for n in norms.ALL if n is not norms.RESPONSE], ids=str)
def test_without_eps_a_tiny_group_has_unit_scale(norm: Norm) -> None:
    """eps hides what underflows; without it 1e-30 must give what 1 gives, and gradients of 1e30."""
    for shape, scale in itertools.product(spread(norm), (1e-10, 1e-18, 1e-20, 1e-30)):
        for layout in LAYOUTS:
            x = lay_out(torch.randn(shape) * scale, layout)
            check(norm, x, torch.randn(shape), eps=0.0)


@pytest.mark.parametrize("norm", norms.ALL, ids=str)
def test_one_extreme_group_among_ordinary_ones(norm: Norm) -> None:
    for shape in spread(norm):
        rows = norm.rows(torch.randn(shape))
        scales = torch.tensor([1.0, 1e30, 1e-30, 1e3]).repeat(len(rows))[: len(rows), None]
        x = norm.from_rows(rows * scales, shape)
        for layout in LAYOUTS:
            y = norm.ours(lay_out(x, layout), None, None)
            found, expected = norm.rows(y), norm.rows(norm.formula(x.double()))
            for row, right in zip(found, expected, strict=True):
                within("output", row, right)


def test_fixed_statistics() -> None:
    x = torch.randn(6, 4, 40) * 1e30
    mean, var = torch.full((4,), 1e29), torch.full((4,), 1e38)
    expected = reference.batch_norm(x.double(), mean.double(), var.double())
    for layout in LAYOUTS:
        laid = lay_out(x, layout)
        within("frozen", functional.frozen_batch_norm(laid, mean, var), expected)
        y = functional.instance_norm(laid, mean, var, use_input_stats=False)
        within("instance norm", y, expected)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e37])
def test_running_statistics_of_instances(scale: float) -> None:
    """A variance beyond float32 is refused, as any that is not finite, and counted."""
    x = (torch.randn(4, 3, 50) + 1) * scale
    mean, var, skipped = torch.zeros(3), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    functional.instance_norm(x, mean, var, momentum=1.0, skipped_updates=skipped)
    assert mean.isfinite().all()
    assert var.isfinite().all()
    if scale < 1:
        within("running_mean", mean, x.double().mean((0, 2)))
        assert torch.equal(skipped, torch.zeros_like(skipped))
    else:
        assert torch.equal(skipped, torch.ones_like(skipped))


@pytest.mark.parametrize("norm", [n for n in norms.ALL if n is not norms.RESPONSE], ids=str)
@pytest.mark.parametrize("scale", [1e150, 1e-160, 1e200, 1e300, 1e-300])
def test_float64(norm: Norm, scale: float) -> None:
    """Beyond 1e154 a float64 square is infinite and the output 0: finite, but no longer right."""
    for shape, layout in itertools.product(spread(norm), LAYOUTS):
        base = torch.randn(shape, dtype=torch.float64)
        y = norm.ours(lay_out(base * scale, layout), None, None)
        assert y.isfinite().all()
        if scale == 1e150:
            torch.testing.assert_close(y, norm.formula(base, eps=1e-300), rtol=1e-12, atol=1e-12)
        elif scale < 1:
            torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-150)

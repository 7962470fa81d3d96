"""Where the kernel of local response norm could go wrong: windows, blocks, powers, huge values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normally import reference
from tests.device.functional import local_response_norm
from tests.helpers import DTYPES, assert_same_bits, assert_within, cpu_only, lay_out, spread

#: One shape for every way to cut a tensor: short planes, which are transposed; planes that are
#: walked as one row, alone and several at a time; columns of a plane in one and in many blocks.
SHAPES = (
    (3, 2, 1),
    (700, 5, 2),
    (37, 47, 1),
    (301, 17, 3),
    (41, 130, 1),
    (2, 960, 7, 7),
    (2, 300, 709),
    (1, 3, 40001),
)
LAYOUTS = ("contiguous", "channels_last", "order 10")
BETAS = (0.5, 0.75, 1.0, 0.6, 0.01, 2.0, 3.5, 0.0, -0.5)


def layout_of(x: Tensor, layout: str) -> Tensor:
    return lay_out(
        x, layout + "".join(map(str, range(2, x.dim()))) if "order" in layout else layout
    )


def window(values: Tensor, before: int, after: int) -> Tensor:
    """Σ over the channels c - before … c + after that exist: a product with a band of ones."""
    c = torch.arange(values.shape[1])
    distance = c[None] - c[:, None]
    band = ((distance >= -before) & (distance <= after)).to(values.dtype)
    return torch.einsum("cj,nj...->nc...", band, values)


def check(
    x: Tensor, g: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> None:
    """Output and gradient against the formulas in float64, each to the size of its terms."""
    leaf = x.detach().requires_grad_()
    y = local_response_norm(leaf, size, alpha, beta, k)
    (dx,) = torch.autograd.grad(y, leaf, g)
    wide, dy = x.double(), g.double()
    d = k + alpha / size * window(wide.square(), size // 2, (size - 1) // 2)
    factor = 2 * alpha * beta / size
    slope = dy * wide * d ** (-beta - 1)
    expected = dy * d**-beta - factor * wide * window(slope, (size - 1) // 2, size // 2)
    terms = (dy * d**-beta).abs() + abs(factor) * wide.abs() * window(
        slope.abs(), (size - 1) // 2, size // 2
    )
    # A relative error of d, 5 roundings at most, is one of |beta| as much in d^-beta.
    steep = max(1.0, abs(beta))
    assert_within(y, wide * d**-beta, steep * (wide * d**-beta).abs(), x.dtype, "output")
    assert_within(dx, expected, (steep + 1) * terms, x.dtype, "gradient")


def pair(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * scale).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 16, 17, 33, 48, 49])
def test_a_window_is_cut_off_at_the_edges(channels: int, layout: str) -> None:
    x = layout_of(torch.ones(5, channels, 3), layout)
    c = torch.arange(channels)
    for size in (*range(1, 10), channels, channels + 1, 2 * channels + 3, 1000):
        first, last = (c - size // 2).clamp(min=0), (c + (size - 1) // 2).clamp(max=channels - 1)
        y = local_response_norm(x, size, float(size), 1.0, 0.0)  # 1 / how many there are
        expected = (1.0 / (last - first + 1)).view(1, -1, 1).expand(x.shape)
        assert_within(y, expected, expected, x.dtype, f"size {size}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 40])
def test_a_gradient_reaches_the_window_and_no_further(size: int, layout: str) -> None:
    for channels in (3, 17, 33):
        for j in {0, 1, channels // 2, channels - 1}:
            x = layout_of(torch.ones(4, channels, 2), layout).requires_grad_()
            y = local_response_norm(x, size, 1.0, 0.75, 1.0)
            (dx,) = torch.autograd.grad(y[:, j].sum(), x)
            reached = [c for c in range(channels) if bool((dx[:, c] != 0).any())]
            first, last = max(0, j - size // 2), min(channels - 1, j + (size - 1) // 2)
            assert reached == list(range(first, last + 1))


@spread("shape, layout, dtype", SHAPES, LAYOUTS, DTYPES)
def test_every_way_to_cut_a_tensor(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, g = pair(shape, dtype)
    check(layout_of(x, layout), layout_of(g, layout), 5, alpha=0.5)
    check(layout_of(x, layout), g, 4, alpha=0.5, k=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", BETAS)
def test_every_power(beta: float, dtype: torch.dtype) -> None:
    for alpha, k in ((1.0, 1.0), (1e-4, 2.0), (30.0, 0.1), (0.0, 1.5)):
        check(*pair((3, 19, 23), dtype, 3.0), 5, alpha, beta, k)
        check(*pair((3, 19, 23), dtype, 3.0), 1, alpha, beta, k)


def test_a_long_window_keeps_its_digits() -> None:
    # Equal terms, whose roundings go the same way: one float sum would be wrong by 1e-5.
    x = torch.full((1, 3000, 17), 0.1)
    check(x, torch.ones_like(x), 3000, alpha=3e4)
    check(*pair((2, 2500, 1), torch.float32), 2001, alpha=1e3)


@pytest.mark.parametrize("beta", [0.5, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("shape", SHAPES[1:6])
def test_values_whose_squares_no_float_holds(shape: tuple[int, ...], beta: float) -> None:
    for dtype, largest in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)):
        x, g = pair(shape, dtype)
        x = (x / x.abs().max() * largest).to(dtype)
        x[::2, ::3] = 1.0  # ordinary ones between
        y = local_response_norm(x, 5, 1e-4, beta)
        assert bool(y.isfinite().all())
        check(x, g, 5, beta=beta)


@pytest.mark.parametrize("beta", [0.6, 0.75, 2.0, 5.0])
def test_powers_that_no_float_holds(beta: float) -> None:
    for scale in (1e4, 1e8, 1e13, 1e17):  # the squares are floats, d^-beta or d^(-beta-1) is not
        x, g = pair((2, 19, 23), torch.float32, scale)
        check(x, g, 5, beta=beta)
        check(x, g * 1e20, 5, alpha=1.0, beta=beta)


def test_settings_that_no_float_holds() -> None:
    x, g = pair((2, 19, 23), torch.float32)
    check(x * 3e17, g, 5, alpha=1e-42, k=1e-6)
    check(x * 1e-20, g * 1e-10, 5, alpha=1.0, k=0.0)
    check(x * 1e15, g, 5, alpha=1e-36, k=1e-6)
    check(x * 1e-18, g, 5, alpha=1e36, k=1.0)
    check(x * 1e10, g * 1e20, 5, alpha=1.0, k=1e-42)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:7])
def test_a_bad_value_stays_in_its_window(shape: tuple[int, ...], layout: str, value: float) -> None:
    size = 4
    x, g = pair(shape, torch.float32)
    x, g = layout_of(x, layout), layout_of(g, layout)
    channel, position = shape[1] // 2, (1, *(n // 2 for n in shape[2:]))
    results = []
    for spoiled in (False, True):
        leaf = x.clone()
        leaf.movedim(1, -1)[position][channel] = value if spoiled else 0.5
        leaf.requires_grad_()
        y = local_response_norm(leaf, size, 1.0)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
    for name, clean, seen, reach in zip(
        ("output", "gradient"), *results, (size // 2, size - 1), strict=True
    ):
        there = clean.movedim(1, -1)[position], seen.movedim(1, -1)[position]
        near = slice(max(0, channel - reach), channel + reach + 1)
        if value != value:
            assert bool(there[1][channel].isnan())
        elif value == 1e30:
            assert bool(seen.isfinite().all())
        there[1][near] = there[0][near]  # all the rest has its bits
        assert_same_bits(seen, clean, name)


@cpu_only("its threads")
@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], layout: str, beta: float, threads: None
) -> None:
    repeats = 1 + 40000 // math.prod(shape)  # enough for the kernel to share the work
    x, g = pair((shape[0] * repeats, *shape[1:]), torch.float32)
    x[::3, ::5] *= 1e25
    x, g = layout_of(x, layout), layout_of(g, layout)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        y = local_response_norm(leaf, 5, beta=beta)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
    for other in results[1:]:
        for name, one, many in zip(("output", "gradient"), results[0], other, strict=True):
            assert_same_bits(many, one, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_mask_hides_is_not_read(shape: tuple[int, ...], layout: str) -> None:
    keep = torch.rand(shape[0], 1, *shape[2:]) < 0.7
    for dtype, k in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.0)):
        x, g = pair(shape, dtype)
        results = []
        for hidden in (math.nan, 0.0):
            leaf = layout_of(torch.where(keep, x, hidden), layout).requires_grad_()
            y = local_response_norm(leaf, 5, 1.0, k=k, mask=keep)
            dy = layout_of(torch.where(keep, g, hidden), layout)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        wide = torch.where(keep, reference.local_response_norm(x.double(), 5, 1.0, k=k), 0.0)
        assert_within(results[0][0], wide, wide.abs(), dtype, "output")
        for name, found, wanted in zip(("output", "gradient"), *results, strict=True):
            assert_same_bits(found, wanted, name)
            assert bool((found[~keep.expand(shape)] == 0).all())

"""Local response norm's Triton kernels against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from normally._triton import local_response_norm as kernels
from tests.device.functional import local_response_norm
from tests.helpers import (
    DTYPES,
    assert_same_bits,
    has_kernels,
    lay_out,
    layouts_of,
    permutations_of,
    spread,
    values,
)
from tests.mask_checks import random_mask
from tests.norm_helpers import check_norm

# Of numpy, in the interpreter: what leaves the range of float32 is taken again in float64.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

NAME = "local_response_norm"
SHAPES = [(1, 1, 1), (3, 2, 5), (2, 7, 17), (2, 17, 2, 5), (1, 3, 67), (1, 5, 3, 2, 3)]
SETTINGS = {"size": 5, "alpha": 0.6, "beta": 0.75, "k": 1.5}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles let small tensors have many, and windows reach over their borders."""
    monkeypatch.setattr(kernels, "_TILE", 128)
    monkeypatch.setattr(kernels, "_ROW_BYTES", 32)


@spread("shape, dtype", SHAPES, DTYPES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    turn = SHAPES.index(shape) + DTYPES.index(dtype)
    for index in (turn, turn + 1):
        layout = ("contiguous", "channels_last", "sliced", "expanded batch")[index % 4]
        gradient = ("contiguous", "expanded batch", "channels_last")[index % 3]
        x = lay_out(values(shape, dtype, seed=index), layout)
        check_norm(NAME, x, gradient=gradient, **{**SETTINGS, "size": 4 + index % 2})


@pytest.mark.parametrize("layout", permutations_of(4))
def test_every_order_of_memory(layout: str) -> None:
    check_norm(NAME, lay_out(values((3, 5, 4, 7), torch.float32), layout), **SETTINGS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 34, 35, 1000])
def test_every_size(size: int, layout: str) -> None:
    """Windows of float32 sums, of 16 and less, and of float64 ones, also beyond all channels."""
    x = lay_out(values((1, 17, 3), torch.float32), layout)
    check_norm(NAME, x, **{**SETTINGS, "size": size, "alpha": float(size)})


@spread(
    "beta, dtype, alpha k",
    (0.5, 0.75, 1.0, 0.6, 0.01, 3.5, 4.25, 0.0, -0.5, -1.0),
    (torch.float64, torch.float32),
    ((1.0, 1.0), (1e-4, 2.0), (30.0, 0.1), (0.0, 1.5)),
)
def test_every_power(beta: float, dtype: torch.dtype, alpha: float, k: float) -> None:
    check_norm(NAME, values((1, 7, 9), dtype) * 3, size=5, alpha=alpha, beta=beta, k=k)


def test_a_long_window_keeps_its_digits() -> None:
    # Equal terms, whose roundings go the same way: one float32 sum would be wrong by 3e-6.
    x = torch.full((1, 200, 1), 0.83)
    check_norm(NAME, x, size=200, alpha=1.45, beta=1.0, k=0.0)


@pytest.mark.parametrize("beta", [0.6, 0.75, 1.0, 5.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_no_float_holds(layout: str, beta: float) -> None:
    """Squares, powers and slopes beyond float32, beside ordinary values."""
    for dtype, largest in ((torch.float32, 3e38), (torch.float32, 1e13), (torch.float16, 6e4)):
        x = values((2, 7, 3), dtype)
        x = (x / x.abs().max() * largest).to(dtype)
        x[::2, ::3] = 1.0
        check_norm(NAME, lay_out(x, layout), size=3, alpha=1e-4, beta=beta)


@pytest.mark.parametrize(
    ("x", "alpha", "k"), [(3e17, 1e-42, 1e-6), (1e-20, 1.0, 0.0), (1e-18, 1e36, 1.0)]
)
def test_settings_that_no_float_holds(x: float, alpha: float, k: float) -> None:
    check_norm(NAME, values((2, 7, 9), torch.float32) * x, size=5, alpha=alpha, k=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    turn = SHAPES.index(shape) + DTYPES.index(dtype)
    layouts = layouts_of(len(shape))
    layout = layouts[turn % len(layouts)]
    x = lay_out(values(shape, dtype, seed=turn), layout)
    mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[turn % 3], seed=turn)
    if "expanded" not in layout:
        x = torch.empty_like(x).copy_(torch.where(mask, x, math.nan))
    hidden = math.nan if turn % 2 else None
    check_norm(NAME, x, mask=mask, hidden_gradient=hidden, gradient=layout, **SETTINGS)


def test_hidden_positions_where_k_is_0() -> None:
    """They are 0, not 0 · 0^-beta, and the others as without a mask."""
    x, keep = values((2, 7, 9), torch.float32), torch.rand(2, 1, 9) < 0.5
    settings = {"size": 5, "alpha": 1.0, "k": 0.0}
    expected = torch.where(keep, local_response_norm(x, **settings), 0.0)
    hidden = torch.where(keep, x, math.nan)
    assert_same_bits(local_response_norm(hidden, **settings, mask=keep), expected)


def _results(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = local_response_norm(leaf, size=3, alpha=1.0)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_bad_value_stays_in_its_window(layout: str, value: float) -> None:
    """All else has the bits that it has without it, though one tile is computed in float64."""
    x, g = lay_out(values((2, 9, 9), torch.float32), layout), values((2, 9, 9), torch.float32, 5)
    clean = _results(x, g)
    x[0, 4, 5] = value
    for name, seen, wanted, reach in zip(
        ("output", "gradient"), _results(x, g), clean, (1, 2), strict=True
    ):
        assert bool(seen[0, 4, 5].isnan()) == (not math.isfinite(value))
        near = slice(4 - reach, 5 + reach)
        seen[0, near, 5] = wanted[0, near, 5]
        assert_same_bits(seen, wanted, name)


def test_a_samples_bits_do_not_depend_on_the_batch() -> None:
    x, g = values((5, 7, 9), torch.bfloat16), values((5, 7, 9), torch.bfloat16, 5)
    for many, one in zip(_results(x, g), _results(x[3:4], g[3:4]), strict=True):
        assert_same_bits(many[3:4], one)


def test_nothing_of_an_empty_tensor() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x = torch.empty(shape, requires_grad=True)
        y = local_response_norm(x, **SETTINGS)
        assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_the_kernels_are_registered() -> None:
    assert has_kernels(NAME)
    assert has_kernels(f"{NAME}_backward")

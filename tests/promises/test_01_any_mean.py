"""Promise 1: the same answer whatever the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normally import reference
from tests.device.functional import batch_norm
from tests.helpers import is_dense, lay_out, layouts_of

# The promise's number: absolute, for an output of unit scale.
ERROR = 1e-6
SHAPES = [
    (4096, 3), (64, 130), (33, 5, 1), (40, 17, 2), (300, 8, 7), (31, 9, 15), (5, 3, 4097),
    (8, 64, 7, 7), (4, 16, 33, 32), (50, 24, 2, 2), (2, 3, 197, 31), (3, 5, 2, 9, 11),
]  # fmt: skip


def largest_error(x: Tensor) -> float:
    """Of the output; an outlier far above unit scale is measured relative to itself."""
    y = batch_norm(x, None, None, training=True)
    expected = reference.batch_norm(x.double())
    return float(((y.double() - expected).abs() / expected.abs().clamp(min=1)).max())


def with_mean(shape: tuple[int, ...], ratio: float) -> Tensor:
    """Unit spread and mean `ratio` of alternating sign, rounded to float32 as input."""
    sign = torch.ones(shape[1])
    sign[1::2] = -1
    return torch.randn(shape) + ratio * sign.view(1, -1, *(1,) * (len(shape) - 2))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 3e5, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_over_std_up_to_a_million(shape: tuple[int, ...], ratio: float) -> None:
    x = with_mean(shape, ratio)
    for layout in layouts_of(len(shape)):
        if not layout.startswith("expanded"):
            assert largest_error(lay_out(x, layout)) <= ERROR, layout


@pytest.mark.parametrize("first", [1e3, 1e5, 1e6, -1e7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_outlier_first_is_no_better_shift(shape: tuple[int, ...], first: float) -> None:
    """A kernel that shifts by the first value, row or block alone loses the rest here."""
    for mean in (0.0, 1e5):
        x = with_mean(shape, mean)
        one = x.clone()
        one[(0, slice(None), *(0,) * (len(shape) - 2))] = first
        row = x.clone()
        row[0, ..., :] = first * torch.randn(row[0].shape)
        for sample in (one, row):
            for layout in ("contiguous", "channels_last", "sliced"):
                assert largest_error(lay_out(sample, layout)) <= ERROR, (mean, layout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mean_that_drifts_within_the_channel(shape: tuple[int, ...]) -> None:
    """Every block has another mean: what the shift fits at the start does not fit at the end."""
    drift = torch.linspace(-1e4, 1e4, shape[0]).view(-1, *(1,) * (len(shape) - 1))
    x = torch.randn(shape) + drift + 1e6
    for layout in ("contiguous", "channels_last"):
        assert largest_error(lay_out(x, layout)) <= ERROR, layout


@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_shift_follows_when_the_start_was_no_sample_of_the_rest(
    layout: str, mean: float
) -> None:
    """A shift from the first values alone makes every later square a thousand times the variance.

    The rest is constant, so that rounding errors add up instead of averaging out: 33 channels of
    131072 values are 32 chunks of 4096 each, uncut among threads.
    """
    for constant in (0.1, 3.3):
        x = torch.full((33, 131072), constant)
        x[:, :512] = mean + torch.randn(33, 512)
        x = lay_out(x.view(33, 32, 4096).movedim(0, 1), layout)
        # Where both meet, 7 constant values for each of the first: 16 additions of half a unit at
        # most make 7·8·2^-24 of the variance, half of that of the output.
        assert largest_error(x) <= ERROR + 7 * 8 * 2**-25, constant


@pytest.mark.parametrize("ratio", [1e3, 1e6])
@pytest.mark.parametrize("shape", [(300, 8, 7), (8, 64, 7, 7), (5, 3, 4097)], ids=str)
def test_gradients_and_running_statistics(shape: tuple[int, ...], ratio: float) -> None:
    x = with_mean(shape, ratio)
    g = torch.randn(shape)
    dims = [d for d in range(len(shape)) if d != 1]
    for layout in ("contiguous", "channels_last"):
        leaf = lay_out(x, layout).detach().requires_grad_()
        wide = x.double().requires_grad_()
        weight = torch.ones(shape[1], requires_grad=True)
        wide_weight = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
        mean, var = torch.zeros(shape[1]), torch.zeros(shape[1])
        y = batch_norm(leaf, mean, var, weight, None, True, 1.0)
        (y * g).sum().backward()
        (reference.batch_norm(wide, weight=wide_weight) * g.double()).sum().backward()
        assert leaf.grad is not None
        assert wide.grad is not None
        assert is_dense(leaf.grad)
        # The gradient has unit scale: rstd is 1 and so is g (its largest about 5).
        assert float((leaf.grad - wide.grad).abs().max()) <= 5 * ERROR
        assert weight.grad is not None
        assert wide_weight.grad is not None
        # A sum of m terms of unit scale: relative to the sum of their sizes, about m·2/π.
        count = x.numel() / shape[1]
        assert float((weight.grad - wide_weight.grad).abs().max()) <= ERROR * count
        # float32 buffers: one rounding of the mean; the variance to the promise's number.
        wanted = x.double().mean(dims)
        assert float(((mean - wanted) / wanted).abs().max()) <= 2**-24
        wanted = x.double().var(dims)
        assert float(((var - wanted) / wanted).abs().max()) <= ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_have_float32_statistics(dtype: torch.dtype) -> None:
    """Values that half precision holds exactly: 2^k + small steps; only the output rounds."""
    step = 2.0 if dtype is torch.bfloat16 else 0.25
    x = (256 + step * torch.randint(0, 16, (33, 5, 49))).to(dtype)
    for layout in ("contiguous", "channels_last"):
        y = batch_norm(lay_out(x, layout), None, None, training=True)
        expected = reference.batch_norm(x.double())
        bound = torch.finfo(dtype).eps * expected.abs() + ERROR
        assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_evaluation(ratio: float) -> None:
    x = with_mean((16, 8, 33), ratio)
    mean, var = x.mean((0, 2)), x.var((0, 2))
    for layout in ("contiguous", "channels_last"):
        y = batch_norm(lay_out(x, layout), mean, var)
        expected = reference.batch_norm(x.double(), mean.double(), var.double())
        assert float((y - expected).abs().max()) <= ERROR

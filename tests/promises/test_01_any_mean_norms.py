"""Promise 1 for the norms without running statistics: the same answer whatever the mean.

RMS norm and local response norm subtract no mean, so nothing cancels in them: their error is
relative to the output, whatever the mean, and held to the same number.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from normally import reference
from tests import norms
from tests.device import functional
from tests.helpers import is_dense, lay_out
from tests.norms import Norm, Shape

# The promise's number: absolute, for an output of unit scale.
ERROR = 1e-6
RATIOS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 3e5, 1e6)


def largest_error(norm: Norm, x: Tensor, mask: Tensor | None = None) -> float:
    """Of the output; an outlier far above unit scale is measured relative to itself."""
    y = norm.ours(x, None, None, mask=mask)
    expected = norm.formula(x.double(), mask=mask)
    return float(((y.double() - expected).abs() / expected.abs().clamp(min=1)).max())


def with_mean(norm: Norm, shape: Shape, ratio: float) -> Tensor:
    """Unit spread and mean `ratio`, its sign another in every second group."""
    rows = torch.randn_like(norm.rows(torch.empty(shape)))
    rows[::2] += ratio
    rows[1::2] -= ratio
    return norm.from_rows(rows, shape)


@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_mean_over_std_up_to_a_million(norm: Norm, shape: Shape) -> None:
    for ratio in RATIOS:
        x = with_mean(norm, shape, ratio)
        for layout in norms.dense_and_not(len(shape)):
            assert largest_error(norm, lay_out(x, layout)) <= ERROR, (ratio, layout)


@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_masked_statistics_do_not_lose_the_mean_either(norm: Norm, shape: Shape) -> None:
    mask = norm.mask(shape)
    for ratio in (1.0, 1e4, 1e6):
        x = with_mean(norm, shape, ratio)
        hidden = torch.where(mask, x, torch.full_like(x, -3 * ratio))
        for layout in ("contiguous", "channels_last", "sliced"):
            assert largest_error(norm, lay_out(hidden, layout), mask) <= ERROR, (ratio, layout)


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("norm", [n for n in norms.ALL if n not in norms.CENTRED], ids=str)
def test_without_a_mean_the_error_is_relative(norm: Norm, ratio: float) -> None:
    for shape in norm.shapes:
        x = with_mean(norm, shape, ratio)
        for layout in norms.dense_and_not(len(shape)):
            laid = lay_out(x, layout)
            y, expected = norm.ours(laid, None, None), norm.formula(laid.double())
            excess = (y - expected).abs() - ERROR * expected.abs()
            assert float(excess.max()) <= 0, (shape, layout)


@pytest.mark.parametrize("norm", norms.WITH_RESIDUAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_a_residual_it_is_the_norm_of_the_rounded_sum(norm: Norm, dtype: torch.dtype) -> None:
    """The sum is torch's bit for bit; what is normalized is what is handed on."""
    assert norm.adds is not None
    for shape, ratio in itertools.product(norm.shapes, (1.0, 1e3, 1e6)):
        if ratio > torch.finfo(dtype).max:
            continue
        x, residual = with_mean(norm, shape, ratio).to(dtype), torch.randn(shape).to(dtype)
        for layout in ("contiguous", "channels_last", "strided"):
            y, total = norm.adds(lay_out(x, layout), lay_out(residual, layout), None, None)
            assert torch.equal(total, x + residual), (shape, layout)
            expected = norm.formula(total.double())
            # llama rounds to the dtype twice: to the same value, there is no weight.
            bound = ERROR * expected.abs().clamp(min=1)
            if dtype is not torch.float32:
                bound = bound + torch.finfo(dtype).eps * expected.abs()
            assert bool(((y - expected).abs() <= bound).all()), (shape, ratio, layout)


@pytest.mark.parametrize("first", [1e3, 1e5, 1e6, -1e7])
@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_an_outlier_first_is_no_better_shift(norm: Norm, shape: Shape, first: float) -> None:
    """A kernel that shifts by the first value or block alone loses the rest here."""
    for mean in (0.0, 1e5):
        rows = norm.rows(with_mean(norm, shape, mean))
        one, some = rows.clone(), rows.clone()
        one[:, 0] = first
        some[:, : max(1, rows.shape[1] // 64)] = first
        for sample in (one, some):
            for layout in ("contiguous", "channels_last", "sliced"):
                x = lay_out(norm.from_rows(sample, shape), layout)
                assert largest_error(norm, x) <= ERROR, (mean, layout)


@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_a_mean_that_drifts_within_the_group(norm: Norm, shape: Shape) -> None:
    """What the shift fits at the start does not fit at the end."""
    rows = norm.rows(torch.randn(shape))
    rows = rows + torch.linspace(-1e4, 1e4, rows.shape[1]) + 1e6
    for layout in ("contiguous", "channels_last"):
        x = lay_out(norm.from_rows(rows, shape), layout)
        assert largest_error(norm, x) <= ERROR, layout


LONG = [
    (norms.LAYER, (3, 131072)), (norms.LAYER_2, (2, 512, 256)), (norms.LAYER_FIRST, (1, 32768, 3)),
    (norms.GROUP, (2, 32, 4096)), (norms.GROUP, (1, 4, 131072)), (norms.GROUP_1, (2, 3, 131, 331)),
    (norms.INSTANCE, (2, 3, 131072)),
]  # fmt: skip


@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.parametrize(("norm", "shape"), LONG, ids=str)
def test_the_shift_follows_when_the_start_was_no_sample_of_the_rest(
    norm: Norm, shape: Shape, mean: float
) -> None:
    """A shift from the first values alone makes every later square a thousand times the variance.

    The rest is constant, so that rounding errors add up instead of averaging out.
    """
    for constant in (0.1, 3.3):
        rows = torch.full_like(norm.rows(torch.empty(shape)), constant)
        rows[:, :512] = mean + torch.randn(rows.shape[0], 512)
        for layout in ("contiguous", "channels_last"):
            x = lay_out(norm.from_rows(rows, shape), layout)
            # Where both meet, 7 constant values for each of the first: 16 additions of half a unit
            # at most make 7·8·2^-24 of the variance, half of that of the output.
            assert largest_error(norm, x) <= ERROR + 7 * 8 * 2**-25, (constant, layout)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_gradients(norm: Norm, shape: Shape, ratio: float) -> None:
    x, g = with_mean(norm, shape, ratio), torch.randn(shape)
    size = norm.parameter_shape(shape)
    for layout in ("contiguous", "channels_last", "sliced"):
        leaves = [lay_out(x, layout), torch.ones(size), torch.zeros(size)]
        wide = [t.double().requires_grad_() for t in leaves]
        leaves = [t.detach().requires_grad_() for t in leaves]
        actual = torch.autograd.grad(norm.ours(*leaves), leaves, g)
        expected = norm.formula(*wide)
        wanted = torch.autograd.grad(expected, wide, g.double())
        if is_dense(leaves[0]):
            assert is_dense(actual[0])
        # Each term of rstd·(g - mean(g) - x̂·mean(g·x̂)), the means at most as large as g is.
        rows = norm.rows(x.double())
        rstd = (rows.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
        peak = norm.rows(g).abs().amax(1, keepdim=True)
        normalized = norm.rows(expected.detach()).abs()
        bound = ERROR * rstd * peak * (2 + normalized)
        error = norm.rows(actual[0].double() - wanted[0]).abs()
        assert bool((error <= bound).all()), (layout, float((error / bound).max()))
        # Sums of terms of unit scale, each off by the output's error: by its number of terms.
        terms = x.numel() / leaves[1].numel()
        for found, right in zip(actual[1:], wanted[1:], strict=True):
            assert float((found - right).abs().max()) <= ERROR * float(g.abs().max()) * terms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("norm", "shape"), norms.cases(norms.CENTRED))
def test_half_inputs_have_float32_statistics(norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    """Values that half precision holds exactly: 2^k + small steps; only the output rounds."""
    step = 2.0 if dtype is torch.bfloat16 else 0.25
    x = (256 + step * torch.randint(0, 16, shape)).to(dtype)
    for layout in ("contiguous", "channels_last"):
        y = norm.ours(lay_out(x, layout), None, None)
        expected = norm.formula(x.double())
        bound = torch.finfo(dtype).eps * expected.abs() + ERROR
        assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_fixed_statistics(ratio: float) -> None:
    """Frozen batch norm, and instance norm in evaluation: the statistics come as float32."""
    x = with_mean(norms.INSTANCE, (16, 8, 33), ratio)
    mean, var = x.mean((0, 2)), x.var((0, 2))
    expected = reference.batch_norm(x.double(), mean.double(), var.double())
    for layout in ("contiguous", "channels_last", "sliced"):
        laid = lay_out(x, layout)
        for y in (
            functional.frozen_batch_norm(laid, mean, var),
            functional.instance_norm(laid, mean, var, use_input_stats=False),
        ):
            assert float((y - expected).abs().max()) <= ERROR


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(40, 5), (9, 7, 33), (3, 17, 7, 7), (2, 3, 4, 5, 6)], ids=str)
def test_masked_batch_norm(shape: Shape, ratio: float) -> None:
    x = torch.randn(shape)
    x[:, ::2] += ratio
    x[:, 1::2] -= ratio
    mask = norms.GROUP.mask(shape)
    expected = reference.batch_norm(x.double(), mask=mask)
    x = torch.where(mask, x, torch.full_like(x, -3 * ratio))
    for layout in norms.dense_and_not(len(shape)):
        y = functional.batch_norm(lay_out(x, layout), None, None, training=True, mask=mask)
        assert float(((y - expected).abs() / expected.abs().clamp(min=1)).max()) <= ERROR, layout

"""Masked RMS norm: whole rows, and masks inside a row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normally.reference import CASTINGS
from tests.device.functional import add_rms_norm, rms_norm
from tests.functional.test_batch_norm_property import views
from tests.helpers import (
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    half_of,
    has_kernels,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.mask_checks import (
    check_compacted,
    check_forms,
    check_gradients,
    check_lengths,
    check_nothing_kept,
    check_padding_is_not_read,
    random_mask,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

NAME = "rms_norm"
SHAPES = [(5, 3), (65, 17), (3, 7, 33), (2, 4, 513), (2, 3, 4, 5), (3, 2, 2, 5, 16)]


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Output, sum and gradients, with NaN in the padding and in the gradients that come to it."""
    weight = ramp(shape[-1:], -1.5, 1.6, parameter_dtype(dtype))
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        residual = torch.where(mask, values(shape, dtype, seed=1), math.inf)
        check_norm(
            NAME,
            x
            if "expanded" in layout
            else torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
            weight if index % 4 else None,
            None,
            residual if index % 3 == 0 else None,
            mask=mask,
            hidden_gradient=math.nan if index % 2 else None,
            casting=CASTINGS[index % 3],
            zero_centered_weight=index % 5 < 2,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", CASTINGS)
def test_compacted_rows_have_the_same_bits(casting: str, dtype: torch.dtype) -> None:
    """A row's result depends on no other, so not on what was taken out (the kernels promise it)."""
    for shape, keep in itertools.product(((9, 5), (4, 7, 64)), (0.1, 0.6, 1.1)):
        weight = ramp(shape[-1:], -1, 2, parameter_dtype(dtype))
        x = values(shape, dtype)
        mask = random_mask(NAME, x, keep=keep)
        check_compacted(NAME, x, weight, None, mask, same_bits=has_kernels(), casting=casting)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_padding_is_not_read(layout: str, dtype: torch.dtype) -> None:
    x, residual = lay_out(values((4, 5, 33), dtype), layout), values((4, 5, 33), dtype, seed=1)
    for casting, other in itertools.product(CASTINGS, (None, residual)):
        check_padding_is_not_read(NAME, x, None, None, random_mask(NAME, x), other, casting=casting)


def test_forms_and_lengths() -> None:
    x = values((4, 3, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 3)
    check_lengths(NAME, values((4, 17, 8), torch.float32), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept(dtype: torch.dtype) -> None:
    x, weight = values((3, 5, 7), dtype), ramp((7,), 1, 2, parameter_dtype(dtype))
    for casting, residual in itertools.product(CASTINGS, (None, x)):
        check_nothing_kept(NAME, x, weight, None, residual, casting=casting)
        # Without eps the statistic of nothing would be 1/0.
        check_nothing_kept(NAME, x, weight, None, residual, casting=casting, eps=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count"), [((3, 4, 5), 2), ((2, 5, 3, 4), 3), ((4, 6), 2), ((3, 7, 16), 2)], ids=str
)
def test_a_mask_inside_a_row(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    """Statistics are those of the kept part."""
    size = shape[-count:]
    weight = ramp(size, -1, 2, parameter_dtype(dtype))
    for casting, residual in itertools.product(CASTINGS, (None, values(shape, dtype, seed=1))):
        x = values(shape, dtype)
        mask = random_mask(NAME, x, {"normalized_shape": size})
        hidden = torch.where(mask, x, math.nan)
        options = {"normalized_shape": size, "casting": casting}
        check_norm(NAME, hidden, weight, None, residual, mask=mask, **options)
        check_nothing_kept(NAME, x, weight, None, residual, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inside_a_row_it_is_the_compacted_row(dtype: torch.dtype) -> None:
    x = values((5, 6, 4), dtype)
    mask = torch.rand(5, 6) < 0.6
    mask[3] = False
    y = rms_norm(x, (6, 4), mask=mask)
    for row in range(5):
        kept = x[row][mask[row]].flatten()
        wanted = rms_norm(kept, kept.shape) if kept.numel() else kept
        tolerance = 1e-12 if dtype is torch.float64 else 2e-6 + torch.finfo(dtype).eps
        torch.testing.assert_close(y[row][mask[row]].flatten(), wanted, rtol=tolerance, atol=0)
        assert torch.count_nonzero(y[row][~mask[row]]) == 0


def test_a_mask_of_whole_rows_of_several_dims() -> None:
    x, residual = values((4, 3, 5), torch.float32), values((4, 3, 5), torch.float32, seed=1)
    rows = torch.tensor([True, False, True, True])
    for mask in (rows.view(4, 1, 1), rows.view(4, 1), rows.view(4, 1).expand(4, 3)):
        y, total = add_rms_norm(x, residual, (3, 5), mask=mask)
        assert_same_bits(y[rows], rms_norm((x + residual)[rows], (3, 5)))
        assert_same_bits(total[rows], (x + residual)[rows])
        assert torch.count_nonzero(y[~rows]) == torch.count_nonzero(total[~rows]) == 0


def test_gradcheck() -> None:
    for shape in ((4, 3), (2, 3, 4)):
        mask = random_mask(NAME, torch.empty(shape))
        check_gradients(NAME, shape, shape[-1], mask, zero_centered_weight=True)
    mask = random_mask(NAME, torch.empty(2, 3, 4), {"normalized_shape": (3, 4)})
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, (3, 4), mask=mask), x)


@settings(max_examples=70)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), casting=st.sampled_from(CASTINGS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, casting: str) -> None:
    x = data.draw(views(dtype))
    size = tuple(x.shape[data.draw(st.integers(0, x.dim() - 1), label="start") :])
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, {"normalized_shape": size}, keep=keep, seed=seed)
    residual = values(tuple(x.shape), dtype, seed=3) if data.draw(st.booleans()) else None
    hidden = torch.empty_like(x).copy_(torch.where(mask, x, math.nan))
    weight = ramp(size, -2, 1.5, parameter_dtype(dtype))
    check_norm(
        NAME, hidden, weight, None, residual, mask=mask, casting=casting, normalized_shape=size
    )

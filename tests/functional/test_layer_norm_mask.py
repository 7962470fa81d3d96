"""Masked layer norm: whole rows, channels first, and masks inside a row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.functional import add_layer_norm, layer_norm
from tests.functional.test_batch_norm_property import views
from tests.helpers import (
    ACTS,
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

NAME = "layer_norm"
# (shape, dim): rows, and columns.
CASES = [
    ((5, 3), None), ((65, 17), None), ((3, 7, 33), None), ((2, 4, 513), None), ((2, 3, 4, 5), None),
    ((3, 2, 2, 5, 16), None), ((9, 4), 1), ((4, 3, 7), 1), ((2, 65, 17), 1), ((2, 5, 7, 7), 1),
    ((2, 3, 2, 3, 5), 1), ((3, 4, 5, 6), 2),
]  # fmt: skip


@spread("shape dim, dtype, half", CASES, DTYPES, BOTH_HALVES)
def test_every_shape(
    shape: tuple[int, ...], dim: int | None, dtype: torch.dtype, half: int
) -> None:
    """Output, sum and gradients, with NaN in the padding and in the gradients that come to it."""
    wide = parameter_dtype(dtype)
    size = shape[-1] if dim is None else shape[dim]
    weight, bias = ramp((size,), -1.5, 1.6, wide), ramp((size,), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=CASES.index((shape, dim))):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, {"dim": dim}, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        residual = torch.where(mask, values(shape, dtype, seed=1), math.inf)
        check_norm(
            NAME,
            x
            if "expanded" in layout
            else torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
            weight if index % 4 else None,
            bias if index % 5 else None,
            residual if index % 3 == 0 else None,
            mask=mask,
            hidden_gradient=math.nan if index % 2 else None,
            act=ACTS[index % len(ACTS)],
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            dim=dim,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compacted_rows_have_the_same_bits(dtype: torch.dtype) -> None:
    """A row's result depends on no other, so not on what was taken out (the kernels promise it)."""
    wide = parameter_dtype(dtype)
    for shape, act, keep in itertools.product(
        ((9, 5), (4, 7, 64)), (None, "silu"), (0.1, 0.6, 1.1)
    ):
        weight, bias = ramp(shape[-1:], -1, 2, wide), ramp(shape[-1:], 1, -1, wide)
        x = values(shape, dtype)
        mask = random_mask(NAME, x, keep=keep)
        check_compacted(NAME, x, weight, bias, mask, same_bits=has_kernels(), act=act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "strided", "order 102"])
def test_compacted_in_other_layouts(layout: str, dtype: torch.dtype) -> None:
    x = lay_out(values((4, 7, 33), dtype), layout)
    for dim, act in itertools.product((None, 1), (None, "gelu")):
        size = (x.shape[-1 if dim is None else dim],)
        weight, bias = (ramp(size, *ends, parameter_dtype(dtype)) for ends in ((-1, 2), (1, -1)))
        mask = random_mask(NAME, x, {"dim": dim})
        check_compacted(NAME, x, weight, bias, mask, act=act, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_padding_is_not_read(layout: str, dtype: torch.dtype) -> None:
    x, residual = lay_out(values((4, 5, 33), dtype), layout), values((4, 5, 33), dtype, seed=1)
    for dim, act, other in itertools.product((None, 1), (None, "silu"), (None, residual)):
        mask = random_mask(NAME, x, {"dim": dim})
        check_padding_is_not_read(NAME, x, None, None, mask, other, dim=dim, act=act)


def test_forms_and_lengths() -> None:
    x = values((4, 3, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 3)
    check_forms(NAME, x, random_mask(NAME, x, {"dim": 1}), 1, dim=1)
    check_lengths(NAME, values((4, 17, 8), torch.float32), -1)
    check_lengths(NAME, values((4, 8, 17), torch.float32), 1, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept(dtype: torch.dtype) -> None:
    x, weight = values((3, 5, 7), dtype), ramp((7,), 1, 2, parameter_dtype(dtype))
    for act, residual in itertools.product(ACTS, (None, x)):
        check_nothing_kept(NAME, x, weight, weight, residual, act=act)
        check_nothing_kept(NAME, x, None, None, residual, act=act, dim=1)


def test_a_whole_row_hidden_among_others() -> None:
    x = values((3, 4, 8), torch.float32)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    y = layer_norm(x, 8, bias=torch.ones(8), mask=mask)
    assert torch.count_nonzero(y[1]) == 0
    assert_same_bits(y[::2], layer_norm(x, 8, bias=torch.ones(8))[::2])


# Masks that vary inside what is normalized together: statistics are those of the kept part.
INSIDE = [((3, 4, 5), 2), ((2, 5, 3, 4), 3), ((4, 6), 2), ((3, 7, 16), 2), ((2, 3, 4, 5, 2), 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "count"), INSIDE, ids=str)
def test_a_mask_inside_a_row(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    size = shape[-count:]
    wide = parameter_dtype(dtype)
    weight, bias = ramp(size, -1, 2, wide), ramp(size, 1, -1, wide)
    for act, residual in itertools.product((None, "silu"), (None, values(shape, dtype, seed=1))):
        x = values(shape, dtype)
        mask = random_mask(NAME, x, {"normalized_shape": size})
        hidden = torch.where(mask, x, math.nan)
        check_norm(NAME, hidden, weight, bias, residual, mask=mask, act=act, normalized_shape=size)
        check_nothing_kept(NAME, x, weight, bias, residual, act=act, normalized_shape=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inside_a_row_it_is_the_compacted_row(dtype: torch.dtype) -> None:
    """Row by row: what is kept of it, normalized by itself."""
    x = values((5, 6, 4), dtype)
    mask = torch.rand(5, 6) < 0.6
    mask[3] = False
    y = layer_norm(x, (6, 4), mask=mask)
    for row in range(5):
        kept = x[row][mask[row]].flatten()
        wanted = layer_norm(kept, kept.shape) if kept.numel() else kept
        tolerance = 1e-12 if dtype is torch.float64 else 2e-6 + torch.finfo(dtype).eps
        torch.testing.assert_close(
            y[row][mask[row]].flatten(), wanted, rtol=tolerance, atol=tolerance
        )
        assert torch.count_nonzero(y[row][~mask[row]]) == 0


def test_a_mask_of_whole_rows_of_several_dims() -> None:
    """(N, 1, 1) says by its shape that rows are whole: the fast way, and the same numbers."""
    x, residual = values((4, 3, 5), torch.float32), values((4, 3, 5), torch.float32, seed=1)
    rows = torch.tensor([True, False, True, True])
    for mask in (rows.view(4, 1, 1), rows.view(4, 1), rows.view(4, 1).expand(4, 3)):
        y, total = add_layer_norm(x, residual, (3, 5), mask=mask)
        assert_same_bits(y[rows], layer_norm((x + residual)[rows], (3, 5)))
        assert_same_bits(total[rows], (x + residual)[rows])
        assert torch.count_nonzero(y[~rows]) == torch.count_nonzero(total[~rows]) == 0
    check_norm(NAME, x, None, None, residual, mask=rows.view(4, 1, 1), normalized_shape=(3, 5))


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck(act: str | None) -> None:
    for shape, dim in (((4, 3), None), ((2, 3, 4), None), ((2, 3, 4), 1)):
        mask = random_mask(NAME, torch.empty(shape), {"dim": dim})
        check_gradients(NAME, shape, shape[-1 if dim is None else dim], mask, act=act, dim=dim)
    mask = random_mask(NAME, torch.empty(2, 3, 4), {"normalized_shape": (3, 4)})
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer_norm(t, (3, 4), act=act, mask=mask), x)


@settings(max_examples=80)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    options: dict[str, object] = {}
    if data.draw(st.booleans(), label="one dim"):
        options["dim"] = dim = data.draw(st.integers(0, x.dim() - 1), label="dim")
        size: tuple[int, ...] = (x.shape[dim],)
    else:
        size = tuple(x.shape[data.draw(st.integers(0, x.dim() - 1), label="start") :])
        options["normalized_shape"] = size
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, options, keep=keep, seed=seed)
    residual = values(tuple(x.shape), dtype, seed=3) if data.draw(st.booleans()) else None
    hidden = torch.empty_like(x).copy_(torch.where(mask, x, math.nan))
    weight = ramp(size, -2, 1.5, parameter_dtype(dtype))
    check_norm(NAME, hidden, weight, None, residual, mask=mask, act=act, **options)

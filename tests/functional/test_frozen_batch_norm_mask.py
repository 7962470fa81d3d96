"""Masked frozen batch norm: its statistics are fixed, so a mask only hides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.functional import frozen_batch_norm
from tests.functional.test_batch_norm_property import views
from tests.helpers import (
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    half_of,
    lay_out,
    layouts_of,
    spread,
    values,
)
from tests.mask_checks import (
    check_forms,
    check_lengths,
    check_nothing_kept,
    check_padding_is_not_read,
    random_mask,
)
from tests.norm_helpers import check_norm, parameter_dtype, ramp

NAME = "frozen_batch_norm"
SHAPES = [(5, 3), (4, 3, 7), (3, 16, 17), (2, 2, 513), (2, 5, 4, 5), (2, 33, 3, 3), (2, 4, 2, 3, 5)]


def statistics(channels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "running_mean": ramp((channels,), -1, 2, dtype),
        "running_var": ramp((channels,), 0.25, 4, dtype),
    }


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        check_norm(
            NAME,
            x
            if "expanded" in layout
            else torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
            weight if index % 3 else None,
            bias if index % 5 else None,
            mask=mask,
            hidden_gradient=math.nan if index % 2 else None,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            **statistics(shape[1], wide),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_what_is_kept_is_as_without_a_mask(layout: str, dtype: torch.dtype) -> None:
    """To the last bit, for output and gradient."""
    x = lay_out(values((3, 9, 4, 5), dtype), layout)
    mask, own = random_mask(NAME, x), statistics(9, parameter_dtype(dtype))
    results = []
    for given_mask in (mask, None):
        leaf = x.detach().requires_grad_()
        y = frozen_batch_norm(leaf, mask=given_mask, **own)
        g = values((3, 9, 4, 5), dtype, seed=5)
        results.append((y.detach(), torch.autograd.grad(y, leaf, g)[0]))
    for masked, plain in zip(*results, strict=True):
        assert_same_bits(masked, torch.where(mask, plain, 0.0))
    check_padding_is_not_read(NAME, x, None, None, mask, **own)


def test_forms_and_lengths() -> None:
    x, own = values((4, 6, 5, 7), torch.float32), statistics(6, torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 1, **own)
    check_lengths(NAME, values((4, 6, 17), torch.float32), 1, **own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_kept(layout: str, dtype: torch.dtype) -> None:
    own = statistics(6, parameter_dtype(dtype))
    check_nothing_kept(NAME, lay_out(values((3, 6, 7), dtype), layout), None, None, **own)


def test_gradcheck() -> None:
    mask, own = random_mask(NAME, torch.empty(2, 4, 3)), statistics(4, torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return frozen_batch_norm(torch.where(mask, x, math.nan), mask=mask, **own)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_view(data: st.DataObject, dtype: torch.dtype) -> None:
    x = data.draw(views(dtype))
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, keep=keep, seed=seed)
    hidden = torch.empty_like(x).copy_(torch.where(mask, x, math.nan))
    check_norm(NAME, hidden, mask=mask, **statistics(x.shape[1], parameter_dtype(dtype)))

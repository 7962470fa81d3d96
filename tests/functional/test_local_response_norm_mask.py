"""Masked local response norm: positions do not know each other, so a mask only hides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.device.functional import local_response_norm
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
    check_compacted,
    check_forms,
    check_gradients,
    check_lengths,
    check_nothing_kept,
    check_padding_is_not_read,
    random_mask,
)
from tests.norm_helpers import check_norm

NAME = "local_response_norm"
SHAPES = [
    (4, 3, 7),
    (3, 16, 17),
    (2, 9, 33),
    (2, 2, 513),
    (2, 5, 4, 5),
    (2, 33, 3, 3),
    (2, 4, 2, 3, 5),
]
SETTINGS = {"size": 5, "alpha": 0.6, "beta": 0.75, "k": 1.5}


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        check_norm(
            NAME,
            x
            if "expanded" in layout
            else torch.empty_like(x).copy_(torch.where(mask, x, math.nan)),
            mask=mask,
            hidden_gradient=math.nan if index % 2 else None,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
            **SETTINGS,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_what_is_kept_is_as_without_a_mask(layout: str, dtype: torch.dtype) -> None:
    """To the last bit, for output and gradient; and as if compacted."""
    x = lay_out(values((3, 9, 4, 5), dtype), layout)
    mask = random_mask(NAME, x)
    results = []
    for given_mask in (mask, None):
        leaf = x.detach().requires_grad_()
        y = local_response_norm(leaf, mask=given_mask, **SETTINGS)
        g = values((3, 9, 4, 5), dtype, seed=5)
        results.append((y.detach(), torch.autograd.grad(y, leaf, g)[0]))
    for masked, plain in zip(*results, strict=True):
        assert_same_bits(masked, torch.where(mask, plain, 0.0))
    check_compacted(NAME, x, None, None, mask, **SETTINGS)
    check_padding_is_not_read(NAME, x, None, None, mask, **SETTINGS)


def test_forms_and_lengths() -> None:
    x = values((4, 6, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 1, **SETTINGS)
    check_lengths(NAME, values((4, 6, 17), torch.float32), 1, **SETTINGS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_kept(layout: str, dtype: torch.dtype) -> None:
    check_nothing_kept(NAME, lay_out(values((3, 6, 7), dtype), layout), None, None, **SETTINGS)


def test_gradcheck() -> None:
    mask = random_mask(NAME, torch.empty(2, 4, 3))
    check_gradients(NAME, (2, 4, 3), 0, mask, **SETTINGS)


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), size=st.integers(1, 12))
def test_any_view(data: st.DataObject, dtype: torch.dtype, size: int) -> None:
    x = data.draw(views(dtype))
    assume(x.dim() > 2)
    keep, seed = data.draw(st.floats(0, 1), label="keep"), data.draw(st.integers(0, 99))
    mask = random_mask(NAME, x, keep=keep, seed=seed)
    hidden = torch.empty_like(x).copy_(torch.where(mask, x, math.nan))
    check_norm(NAME, hidden, mask=mask, size=size, alpha=0.5)

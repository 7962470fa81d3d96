"""Masked batch norm: the statistics of what is kept, and nothing of the padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device.functional import batch_norm
from tests.functional.test_batch_norm_property import views
from tests.helpers import (
    ACTS,
    BOTH_HALVES,
    DTYPES,
    assert_same_bits,
    check_batch_norm,
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
from tests.norm_helpers import parameter_dtype, ramp

NAME = "batch_norm"
TRAINING: dict[str, Any] = {"running_mean": None, "running_var": None, "training": True}
SHAPES = [
    (5, 3), (33, 17), (4, 3, 7), (3, 16, 17), (2, 65, 9), (3, 2, 513), (2, 1, 4097), (2, 3, 4, 5),
    (3, 17, 7, 7), (2, 64, 3, 3), (1, 5, 13, 15), (2, 3, 2, 3, 5), (257, 4, 2),
]  # fmt: skip


def padded(x: Tensor, mask: Tensor, value: float = math.nan) -> Tensor:
    """`x` with garbage where it is hidden, in its own layout."""
    return torch.empty_like(x).copy_(torch.where(mask, x, value))


@spread("shape, dtype, half", SHAPES, DTYPES, BOTH_HALVES)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, half: int) -> None:
    """Output, running statistics and gradients, with NaN in the padding of input and residual."""
    wide = parameter_dtype(dtype)
    weight, bias = ramp((shape[1],), -1.5, 1.6, wide), ramp((shape[1],), 0.7, -0.9, wide)
    for index, layout in half_of(half, layouts_of(len(shape)), start=SHAPES.index(shape)):
        x = lay_out(values(shape, dtype, seed=index), layout)
        mask = random_mask(NAME, x, keep=(0.6, 0.1, 0.95)[index % 3], seed=index)
        mask.view(-1)[1] = True  # two values at least
        garbage = math.nan if "expanded" not in layout else 0.0
        residual = padded(values(shape, dtype, seed=1), mask) if index % 3 == 0 else None
        check_batch_norm(
            x if "expanded" in layout else padded(x, mask, garbage),
            weight if index % 4 else None,
            bias if index % 5 else None,
            residual,
            mask=mask,
            training=index % 7 != 0,
            act=ACTS[index % len(ACTS)],
            correction=index % 2,
            unbiased=index % 5 > 0,
            gradient=("contiguous", "expanded batch", layout)[index % 3],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_compacted(layout: str, dtype: torch.dtype) -> None:
    wide = parameter_dtype(dtype)
    weight, bias = ramp((5,), -1, 2, wide), ramp((5,), 1, -1, wide)
    for shape, act in itertools.product(((9, 5), (4, 5, 17), (3, 5, 7, 7)), (None, "silu")):
        x = lay_out(values(shape, dtype), layout)
        for keep in (0.5, 0.9, 1.1):
            mask = random_mask(NAME, x, keep=keep)
            check_compacted(NAME, x, weight, bias, mask, act=act, **TRAINING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_running_statistics_are_those_of_the_compacted_data(
    layout: str, dtype: torch.dtype
) -> None:
    """To the rounding of two orders of summation, with every convention and the counter."""
    x = values((4, 5, 33), dtype)
    mask = random_mask(NAME, x)
    compact = x.movedim(1, -1)[mask[:, 0]]
    for momentum, unbiased in itertools.product((0.3, None), (True, False)):
        results = []
        for given_x, given_mask in ((padded(lay_out(x, layout), mask), mask), (compact, None)):
            buffers = {
                "running_mean": torch.zeros(5, dtype=parameter_dtype(dtype)),
                "running_var": torch.ones(5, dtype=parameter_dtype(dtype)),
                "num_batches_tracked": torch.tensor(3),
                "skipped_updates": torch.zeros(5, dtype=torch.int64),
            }
            batch_norm(
                given_x, training=True, momentum=momentum, unbiased=unbiased, mask=given_mask,
                **buffers,
            )  # fmt: skip
            results.append(buffers)
        tolerance = 1e-14 if dtype is torch.float64 else 3e-7  # two roundings of the buffer
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "order 102"])
def test_padding_is_not_read(layout: str, dtype: torch.dtype) -> None:
    x = lay_out(values((4, 5, 33), dtype), layout)
    residual = values((4, 5, 33), dtype, seed=1)
    mask = random_mask(NAME, x)
    for act, other in itertools.product((None, "relu", "silu"), (None, residual)):
        check_padding_is_not_read(NAME, x, None, None, mask, other, act=act, **TRAINING)


def test_forms_and_lengths() -> None:
    x = values((4, 3, 5, 7), torch.float32)
    check_forms(NAME, x, random_mask(NAME, x), 1, **TRAINING)
    check_lengths(NAME, values((4, 3, 17), torch.float32), 1, **TRAINING)
    check_lengths(NAME, values((4, 17, 3), torch.float32), -1, channel_dim=-1, **TRAINING)


def test_channels_at_another_dimension() -> None:
    """`channel_dim` moves the mask's dimensions with the input's."""
    x = values((4, 6, 5, 3), torch.float64)
    mask = torch.rand(4, 6, 5) < 0.6
    y = batch_norm(x, None, None, training=True, channel_dim=-1, mask=mask)
    moved = batch_norm(x.movedim(-1, 1), None, None, training=True, mask=mask)
    torch.testing.assert_close(y, moved.movedim(1, -1), rtol=1e-13, atol=1e-13)
    assert_same_bits(
        batch_norm(x, None, None, training=True, channel_dim=-1, mask=mask.unsqueeze(-1)), y
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_kept(momentum: float | None, dtype: torch.dtype) -> None:
    """Zeros, gradients of 0, and every buffer's bits as they were."""
    wide = parameter_dtype(dtype)
    x, weight = values((3, 5, 7), dtype), ramp((5,), 1, 2, wide)
    for act in ACTS:
        check_nothing_kept(NAME, x, weight, weight, act=act, **TRAINING)
        check_nothing_kept(NAME, x, weight, weight, x, act=act, **TRAINING)
    buffers = {
        "running_mean": ramp((5,), -1, 1, wide), "running_var": ramp((5,), 0.5, 2, wide),
        "num_batches_tracked": torch.tensor(3), "skipped_updates": torch.arange(5),
    }  # fmt: skip
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    mask = torch.zeros(3, 7, dtype=torch.bool)
    leaf = torch.full_like(x, math.nan).requires_grad_()
    for given_x in (x, leaf):
        batch_norm(given_x, training=True, momentum=momentum, mask=mask, **buffers)
    for name, buffer in buffers.items():
        assert_same_bits(buffer, before[name], name)


def test_one_value_kept_is_one_value_a_channel() -> None:
    x = values((3, 2, 4), torch.float32)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    mean, var = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm(x, mean, var, training=True, mask=mask)
    assert mean.tolist() == [0, 0]
    y = batch_norm(x, mean, var, training=True, mask=mask, on_single_value="running")
    assert_same_bits(y, batch_norm(x, mean, var, mask=mask))
    assert torch.count_nonzero(y) == 2


def test_a_bad_channel_is_counted_only_where_it_is_kept() -> None:
    x = values((3, 4, 5), torch.float32)
    x[0, 1, 0] = math.nan  # kept
    x[0, 2, 1] = math.nan  # hidden
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 1] = False
    mean, var, skipped = torch.zeros(4), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    batch_norm(x, mean, var, training=True, mask=mask, skipped_updates=skipped)
    assert skipped.tolist() == [0, 1, 0, 0]
    assert mean.isfinite().all()
    assert (mean != 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4)], ids=str)
def test_gradcheck(shape: tuple[int, ...], act: str | None) -> None:
    mask = random_mask(NAME, torch.empty(shape))
    mask.view(-1)[1] = True
    check_gradients(NAME, shape, shape[1], mask, act=act, **TRAINING)


@settings(max_examples=80)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    mask = random_mask(
        NAME, x, keep=data.draw(st.floats(0, 1), label="keep"), seed=data.draw(st.integers(0, 99))
    )
    if mask.sum() == 1:
        mask.view(-1)[1] = True
    residual = None
    if data.draw(st.booleans(), label="residual"):
        residual = values(tuple(x.shape), dtype, seed=3)
    check_batch_norm(
        padded(x, mask),
        ramp((x.shape[1],), -2, 1.5, parameter_dtype(dtype)),
        None,
        residual,
        mask=mask,
        act=act,
        training=data.draw(st.booleans(), label="training"),
    )


def test_a_residual_of_another_dtype_leaves_the_padding_0() -> None:
    """The activation comes after the sum then, and sigmoid(0) is not 0."""
    x, residual = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0], residual[0] = False, torch.nan
    y = batch_norm(x, None, None, training=True, act="sigmoid", residual=residual, mask=mask)
    assert y[0].eq(0).all()
    assert y[1:].gt(0).all()

"""Random shapes, layouts, offsets and strides: what a list of cases does not think of."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.device.functional import batch_norm
from tests.helpers import ACTS, DTYPES, assert_same_bits, check_batch_norm, values

# A vector of any width and its neighbours, a block and its neighbours, and primes between.
SIZES = st.sampled_from(
    [1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 257]
)


@st.composite
def shapes(draw: st.DrawFn, limit: int = 20_000) -> tuple[int, ...]:
    """2 to 5 dimensions, more than one value per channel, at most `limit` elements."""
    size = [draw(SIZES) for _ in range(draw(st.integers(2, 5)))]
    while math.prod(size) > limit:
        largest = size.index(max(size))
        size[largest] = max(1, size[largest] // 2)
    if math.prod(size) == size[1]:
        size[0] = 2
    return tuple(size)


@st.composite
def views(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """A view of a larger buffer: any order of dimensions, any steps, any first element."""
    shape = draw(shapes())
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    if math.prod(shape) * math.prod(steps) > 200_000:
        steps = [1] * len(shape)
    offset = draw(st.integers(0, 5))
    strides, total = [0] * len(shape), 1
    for d in order:
        strides[d] = total * steps[d]
        total *= shape[d] * steps[d]
    buffer = torch.full((offset + total,), math.nan, dtype=dtype)
    view = buffer.as_strided(shape, strides, offset)
    return view.copy_(values(shape, dtype, seed=draw(st.integers(0, 1000))))


@settings(max_examples=250)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    channels = x.shape[1]
    parameter_dtype = dtype if dtype is torch.float64 else torch.float32
    weight = torch.linspace(-2, 1.5, channels, dtype=parameter_dtype)
    bias = torch.linspace(1, -1, channels, dtype=parameter_dtype)
    residual = None
    if data.draw(st.booleans(), label="residual"):
        broadcast = [n if data.draw(st.booleans()) else 1 for n in x.shape]
        residual = values(tuple(broadcast), dtype, seed=3)
    check_batch_norm(
        x,
        weight if data.draw(st.booleans(), label="weight") else None,
        bias if data.draw(st.booleans(), label="bias") else None,
        residual,
        training=data.draw(st.booleans(), label="training"),
        act=act,
    )


@settings(max_examples=100)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_layout_does_not_matter_in_evaluation(data: st.DataObject, dtype: torch.dtype) -> None:
    """The output of an element depends on that element: the same bits from every layout."""
    x = data.draw(views(dtype))
    mean = torch.linspace(-1, 1, x.shape[1], dtype=torch.promote_types(dtype, torch.float32))
    act = data.draw(st.sampled_from(ACTS))
    y = batch_norm(x, mean, mean + 2, act=act)
    assert_same_bits(y, batch_norm(x.contiguous(), mean, mean + 2, act=act))


@settings(max_examples=60)
@given(data=st.data(), exponent=st.integers(-3, 6))
def test_error_does_not_grow_with_the_mean(data: st.DataObject, exponent: int) -> None:
    """A gate on the condition number |mean|/std, for any view."""
    x = data.draw(views(torch.float32))
    shifted = torch.empty_like(x).copy_(x * 1.0 + 10.0**exponent)
    check_batch_norm(shifted, act=None)

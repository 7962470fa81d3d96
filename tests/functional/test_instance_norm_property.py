"""Instance norm of random views: shapes, strides, offsets, and a gate on |mean|/std."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.functional.test_batch_norm_property import views
from tests.helpers import ACTS, DTYPES
from tests.norm_helpers import check_norm, parameter_dtype, ramp


@settings(max_examples=120)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    assume(math.prod(x.shape[2:]) > 1)
    channels = x.shape[1]
    wide = data.draw(st.sampled_from([dtype, parameter_dtype(dtype)]), label="parameters")
    check_norm(
        "instance_norm",
        x,
        ramp((channels,), -2, 1.5, wide) if data.draw(st.booleans(), label="weight") else None,
        ramp((channels,), 1, -1, wide) if data.draw(st.booleans(), label="bias") else None,
        act=act,
    )


@settings(max_examples=50)
@given(data=st.data(), exponent=st.integers(-3, 6))
def test_error_does_not_grow_with_the_mean(data: st.DataObject, exponent: int) -> None:
    x = data.draw(views(torch.float32))
    assume(math.prod(x.shape[2:]) > 1)
    check_norm("instance_norm", torch.empty_like(x).copy_(x + 10.0**exponent))

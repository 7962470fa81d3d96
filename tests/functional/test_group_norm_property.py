"""Group norm of random views: shapes, groups, strides, offsets, and a gate on |mean|/std."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.test_batch_norm_property import views
from tests.helpers import ACTS, DTYPES
from tests.norm_helpers import check_norm, parameter_dtype, ramp


def a_number_of_groups(draw: st.DataObject, x: Tensor) -> int:
    channels = x.shape[1]
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    groups = draw.draw(st.sampled_from(divisors), label="groups")
    assume(x.numel() > groups)  # one value a group in a batch of one is refused
    return groups


@settings(max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    channels = x.shape[1]
    wide = data.draw(st.sampled_from([dtype, parameter_dtype(dtype)]), label="parameters")
    check_norm(
        "group_norm",
        x,
        ramp((channels,), -2, 1.5, wide) if data.draw(st.booleans(), label="weight") else None,
        ramp((channels,), 1, -1, wide) if data.draw(st.booleans(), label="bias") else None,
        act=act,
        num_groups=a_number_of_groups(data, x),
    )


@settings(max_examples=60)
@given(data=st.data(), exponent=st.integers(-3, 6))
def test_error_does_not_grow_with_the_mean(data: st.DataObject, exponent: int) -> None:
    x = data.draw(views(torch.float32))
    shifted = torch.empty_like(x).copy_(x + 10.0**exponent)
    check_norm("group_norm", shifted, num_groups=a_number_of_groups(data, x))

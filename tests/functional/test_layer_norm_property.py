"""Layer norm of random views: shapes, strides, offsets, and a gate on |mean|/std."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional.test_batch_norm_property import views
from tests.helpers import ACTS, DTYPES, values
from tests.norm_helpers import check_norm, parameter_dtype, ramp


@settings(max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), act=st.sampled_from(ACTS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, act: str | None) -> None:
    x = data.draw(views(dtype))
    options: dict[str, object] = {}
    if data.draw(st.booleans(), label="one dim"):
        options["dim"] = dim = data.draw(st.integers(-x.dim(), x.dim() - 1), label="dim")
        size: tuple[int, ...] = (x.shape[dim],)
    else:
        size = tuple(x.shape[data.draw(st.integers(0, x.dim() - 1), label="start") :])
        options["normalized_shape"] = size
    wide = data.draw(st.sampled_from([dtype, parameter_dtype(dtype)]), label="parameters")
    residual = None
    if data.draw(st.booleans(), label="residual"):
        broadcast = [n if data.draw(st.booleans()) else 1 for n in x.shape]
        residual = values(tuple(broadcast), dtype, seed=3)
    check_norm(
        "layer_norm",
        x,
        ramp(size, -2, 1.5, wide) if data.draw(st.booleans(), label="weight") else None,
        ramp(size, 1, -1, wide) if data.draw(st.booleans(), label="bias") else None,
        residual,
        act=act,
        **options,
    )


@settings(max_examples=60)
@given(data=st.data(), exponent=st.integers(-3, 6))
def test_error_does_not_grow_with_the_mean(data: st.DataObject, exponent: int) -> None:
    x = data.draw(views(torch.float32))
    shifted = torch.empty_like(x).copy_(x + 10.0**exponent)
    dim = data.draw(st.sampled_from([None, 1]))
    check_norm("layer_norm", shifted, dim=dim)

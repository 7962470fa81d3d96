"""RMS norm of random views: shapes, strides and offsets."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normally.reference import CASTINGS
from tests.functional.test_batch_norm_property import views
from tests.helpers import DTYPES, values
from tests.norm_helpers import check_norm, parameter_dtype, ramp


@settings(max_examples=120)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), casting=st.sampled_from(CASTINGS))
def test_any_view(data: st.DataObject, dtype: torch.dtype, casting: str) -> None:
    x = data.draw(views(dtype))
    size = tuple(x.shape[data.draw(st.integers(0, x.dim() - 1), label="start") :])
    wide = data.draw(st.sampled_from([dtype, parameter_dtype(dtype)]), label="parameters")
    residual = None
    if data.draw(st.booleans(), label="residual"):
        broadcast = [n if data.draw(st.booleans()) else 1 for n in x.shape]
        residual = values(tuple(broadcast), dtype, seed=3)
    check_norm(
        "rms_norm",
        x,
        ramp(size, -2, 1.5, wide) if data.draw(st.booleans(), label="weight") else None,
        None,
        residual,
        normalized_shape=size,
        casting=casting,
        zero_centered_weight=data.draw(st.booleans(), label="zero centred"),
        eps=data.draw(st.sampled_from([None, 1e-6, 1.0]), label="eps"),
    )


@settings(max_examples=40)
@given(data=st.data(), exponent=st.integers(-12, 12))
def test_any_scale(data: st.DataObject, exponent: int) -> None:
    """Without eps the result does not depend on a common power of two, not by a bit."""
    x = data.draw(views(torch.float32))
    scaled = torch.empty_like(x).copy_(x * 2.0**exponent)
    check_norm("rms_norm", scaled, eps=1e-12)

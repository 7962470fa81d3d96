"""Local response norm of random views, windows and settings."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.functional.test_batch_norm_property import views
from tests.helpers import DTYPES
from tests.norm_helpers import check_norm


@settings(max_examples=120)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 20),
    alpha=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 3.0]),
    beta=st.sampled_from([0.5, 0.75, 1.0, 2.0, 0.3]),
    k=st.sampled_from([0.1, 1.0, 2.0]),
)
def test_any_view(
    data: st.DataObject, dtype: torch.dtype, size: int, alpha: float, beta: float, k: float
) -> None:
    x = data.draw(views(dtype))
    assume(x.dim() > 2)
    check_norm("local_response_norm", x, size=size, alpha=alpha, beta=beta, k=k)

"""`normally::local_response_norm` and its backward."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .norm import define_norm


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> Tensor:
    # A hidden value is in no other position's window. With k = 0 its own would be 0 · 0^-beta.
    x = reference.hide(input, mask)
    return reference.hide(reference.local_response_norm(x, size, alpha, beta, k), mask)


local_response_norm = define_norm(
    "local_response_norm",
    "int size, float alpha, float beta, float k",
    formula=_formula,
    stats_shape=lambda *_: (0,),
    gpu="local_response_norm",
)

"""`normally::rms_norm` over the dimensions from `start_dim` on, and its backward."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .layer_norm import rows
from .norm import define_norm

#: The order of casting as the operators know it: the place in `reference.CASTINGS`.
CASTING_CODES = {casting: code for code, casting in enumerate(reference.CASTINGS)}


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    start_dim: int,
    eps: float,
    casting: int,
    zero_centered_weight: bool,
) -> Tensor:
    return reference.rms_norm(
        input, input.shape[start_dim:], weight, eps, mask=mask,
        casting=reference.CASTINGS[casting], zero_centered_weight=zero_centered_weight,
    )  # fmt: skip


rms_norm = define_norm(
    "rms_norm",
    "int start_dim, float eps, int casting, bool zero_centered_weight",
    formula=_formula,
    gpu="rms_norm",
    # 1/√(mean(x²) + eps) of every sample.
    stats_shape=lambda input, start_dim, *_: (rows(input, start_dim, input.dim() - start_dim),),
)

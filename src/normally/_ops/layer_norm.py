"""`normally::layer_norm` over `num_dims` dimensions from `start_dim` on, and its backward."""

from __future__ import annotations

import math

from torch import Tensor

from .. import reference
from . import activation
from .norm import define_norm


def _formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    start_dim: int,
    num_dims: int,
    eps: float,
    act: int,
    act_param: float,
) -> Tensor:
    is_last = start_dim + num_dims == input.dim()
    return reference.layer_norm(
        input, input.shape[start_dim : start_dim + num_dims], weight, bias, eps,
        dim=None if is_last else start_dim, mask=mask, **activation.decode(act, act_param),
    )  # fmt: skip


def rows(input: Tensor, start_dim: int, num_dims: int) -> int:
    """How many samples there are: the product of all other sizes."""
    return math.prod(input.shape[:start_dim] + input.shape[start_dim + num_dims :])


layer_norm = define_norm(
    "layer_norm",
    "int start_dim, int num_dims, float eps, int act, float act_param",
    formula=_formula,
    gpu="layer_norm",
    # Mean and 1/√(var + eps) of every sample.
    stats_shape=lambda input, start_dim, num_dims, *_: (2, rows(input, start_dim, num_dims)),
)

"""Layer norm on the GPU: the kernels of row_forward and row_backward, with a mean."""

from __future__ import annotations

from torch import Tensor

from . import row_backward, row_forward
from .row_tiles import Settings


def forward(
    output: Tensor,
    total: Tensor,
    stats: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    start_dim: int,
    num_dims: int,
    eps: float,
    act: int,
    act_param: float,
) -> None:
    """Fill output, sum, and stats with mean and 1/√(var + eps) of every sample."""
    settings = Settings(start_dim, start_dim + num_dims, True, eps, act, act_param)
    row_forward.forward(output, total, stats, input, residual, weight, bias, mask, settings)


def backward(
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    start_dim: int,
    num_dims: int,
    eps: float,
    act: int,
    act_param: float,
    need: int,
) -> None:
    """Fill the gradients that are not empty."""
    settings = Settings(start_dim, start_dim + num_dims, True, eps, act, act_param)
    row_backward.backward(
        grad_input, grad_weight, grad_bias, grad_output, grad_sum, input, weight, bias, mask, stats,
        settings,
    )  # fmt: skip

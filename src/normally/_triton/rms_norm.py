"""RMS norm on the GPU: the kernels of row_forward and row_backward, without a mean."""

from __future__ import annotations

from torch import Tensor

from . import row_backward, row_forward
from .row_tiles import Settings

#: The code of the casting that rounds x̂ before the weight; the others round once.
_LLAMA = 1


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
    eps: float,
    casting: int,
    zero_centered_weight: bool,
) -> None:
    """Fill output, sum, and stats with 1/√(mean(x²) + eps) of every sample; there is no bias."""
    settings = Settings(
        start_dim, input.dim(), False, eps, llama=casting == _LLAMA, plus_one=zero_centered_weight
    )
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
    eps: float,
    casting: int,
    zero_centered_weight: bool,
    need: int,
) -> None:
    """Fill the gradients that are not empty."""
    settings = Settings(start_dim, input.dim(), False, eps, plus_one=zero_centered_weight)
    row_backward.backward(
        grad_input, grad_weight, grad_bias, grad_output, grad_sum, input, weight, bias, mask, stats,
        settings,
    )  # fmt: skip

"""`local_response_norm`: check, then call the operator."""

from __future__ import annotations

from torch import Tensor

from .._ops.local_response_norm import local_response_norm as operator
from ._checks import ArgumentError, check_input
from ._masks import prepare_mask


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Local response normalization (Krizhevsky et al. 2012, "ImageNet classification", 3.3).

        y = x / (k + alpha / size * Σ x²)^beta

    The sum of channel c is over the channels c - size//2 … c + (size - 1)//2 that exist, at the
    same position. torch's convention: alpha is divided by `size`, whatever is cut off at the edges.
    One pass, in float32 for half inputs.

    Args:
        input: `(N, C, *)` with at least 3 dimensions; float64, float32, bfloat16 or float16, any
            strides.
        size: how many channels a sum is over; at least 1.
        alpha: in units of 1/x² if k is a number.
        beta: the exponent.
        k: what is added to the sum.
        mask: bool, True where a position counts; broadcastable to `(N, *)`, or `(N, 1, *)`. Masked
            positions give 0 and get a gradient of 0, whatever they hold.
        lengths: `(N,)` integers instead of a mask, for `(N, C, L)`: the first lengths[n] positions
            count.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for less than 3 dimensions or a size below 1; where torch raises RuntimeError,
            it is that as well.
        TypeError: if the input is not floating point.

    >>> import torch
    >>> x = torch.tensor([[[3.0], [4.0]]])
    >>> local_response_norm(x, size=2, alpha=2.0, beta=0.5, k=0.0).flatten()
    tensor([1.0000, 0.8000])
    """
    check_input(input, "local_response_norm")
    if input.dim() < 3:
        raise ValueError(
            "local_response_norm: Expected 3D or higher dimensionality input "
            f"(got {input.dim()} dimensions), (N, C, *)"
        )
    if size < 1:
        raise ArgumentError(f"local_response_norm: size must be 1 or more. Got size={size}.")
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, 1, "local_response_norm")
    return operator(input, None, None, None, mask, size, alpha, beta, k)[0]

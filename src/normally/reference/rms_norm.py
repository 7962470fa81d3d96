"""Root-mean-square normalization as its formula, with its three orders of casting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .normalization import hide, transform, widen

#: When a half-precision result is rounded: once at the end ("torch" and "gemma"), or before the
#: weight as well ("llama").
CASTINGS = ("torch", "llama", "gemma")


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting: str = "torch",
    zero_centered_weight: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

        y = weight * x / √(mean(x²) + eps)

    Args:
        input: `(*, *normalized_shape)`.
        normalized_shape: what is normalized together.
        weight: of `normalized_shape`; None is 1.
        eps: in units of x²; None is the machine epsilon of float32, of float64 for float64.
        casting: one of `CASTINGS`.
        zero_centered_weight: multiply by 1 + weight.
        mask: bool, broadcastable to `input`; False enters no statistic and gives 0.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,), eps=0.0) * 12.5**0.5
    tensor([[3., 4.]])
    """
    x = hide(widen(input), mask)
    if eps is None:
        eps = default_eps(input.dtype)
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    square = x.square()
    if mask is None:
        mean_square = square.mean(dims, keepdim=True)
    else:
        kept = mask.expand(x.shape).to(x.dtype).sum(dims, keepdim=True)
        mean_square = square.sum(dims, keepdim=True) / kept.clamp(min=1)
        mean_square = torch.where(kept == 0, torch.ones_like(mean_square), mean_square)
    y = x / torch.sqrt(mean_square + eps)
    if casting == "llama":
        y = widen(y.to(input.dtype))
    if weight is not None and zero_centered_weight:
        weight = 1 + widen(weight)
    return transform(y, weight, None, list(normalized_shape), mask=mask).to(input.dtype)


def default_eps(dtype: torch.dtype) -> float:
    """What eps=None means, as in torch: the machine epsilon of the dtype of the arithmetic."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps

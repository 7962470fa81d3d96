"""Local response normalization as its formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .normalization import widen


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response normalization (Krizhevsky et al. 2012).

        y = x / (k + alpha / size * Σ x²)^beta

    The sum of a channel c is over the `size` channels c - size//2 … c + (size - 1)//2, those that
    exist; torch's convention, in which alpha is divided by `size`.

    >>> import torch
    >>> local_response_norm(torch.tensor([[1.0, 2.0]]), size=1, alpha=1.0, beta=1.0)
    tensor([[0.5000, 0.4000]])
    """
    x = widen(input)
    channels = x.shape[1]
    below, above = size // 2, (size - 1) // 2
    padded = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [below, above])
    total = sum(padded[:, i : i + channels] for i in range(size))
    return (x * (k + alpha / size * total) ** -beta).to(input.dtype)

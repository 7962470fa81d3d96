"""Group normalization as its formula; instance normalization is that with a group a channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .normalization import hide, moments, normalize, transform, widen


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Group normalization (Wu & He 2018, arXiv:1803.08494).

        y = act(weight * (x - mean) / √(var + eps) + bias)

    Mean and biased variance of each sample and each of `num_groups` groups of C / num_groups
    neighbouring channels, over those channels and all positions; γ and β per channel.

    Args:
        input: `(N, C, *)`.
        num_groups: divides C; C is instance normalization, 1 is layer normalization over (C, *).
        weight: γ, `(C,)`; None is 1.
        bias: β, `(C,)`; None is 0.
        eps: in units of x².
        act: a name of `ACTIVATIONS`.
        act_param: leaky_relu's slope, elu's alpha.
        mask: bool, `(N, 1, *)`; False enters no statistic and gives 0.

    >>> group_norm(torch.tensor([[[1.0, 3.0], [5.0, 9.0]]]), 2, eps=0.0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    x = hide(widen(input), mask)
    shape = [1, -1, *(1,) * (x.dim() - 2)]
    grouped, kept_grouped = _grouped(x, num_groups, mask)
    mean, var = moments(grouped, (2, 3), kept_grouped)
    y = normalize(grouped, mean, var, eps).reshape(x.shape)
    return transform(y, weight, bias, shape, act, act_param, mask=mask).to(input.dtype)


def group_statistics(input: Tensor, num_groups: int, mask: Tensor | None = None) -> Tensor:
    """Mean, biased variance and number of values of each sample and group, (3, N, num_groups)."""
    x = widen(input)
    grouped, kept = _grouped(x, num_groups, mask)
    mean, var = moments(grouped, (2, 3), kept)
    if kept is None:
        values = torch.full_like(mean, math.prod(grouped.shape[2:]))
    else:
        values = kept.to(x.dtype).sum((2, 3), keepdim=True).expand_as(mean) * grouped.shape[2]
    return torch.stack((mean, var, values))[..., 0, 0]


def _grouped(x: Tensor, num_groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`x` as (N, groups, channels a group, positions), and the mask beside it."""
    n, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    grouped = x.reshape(n, num_groups, channels // num_groups, positions)
    return grouped, None if mask is None else mask.reshape(n, 1, 1, positions)

"""Mean and variance, normalization, and the averages of statistics: what every norm is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .activation import activate


def widen(x: Tensor) -> Tensor:
    """`x` in the widest floating dtype of its device: float64, but float32 on MPS."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x`, and 0 where `mask` is False: whatever was there has no value and no derivative."""
    return x if mask is None else torch.where(mask, x, torch.zeros_like(x))


def moments(x: Tensor, dims: Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`, which stay as 1 (formulas 1 and 2).

        mean = Σx / m        var = Σ(x - mean)² / m

    With `mask`, bool and broadcastable to `x`, over the m values where it is True; where it is True
    nowhere, the mean is 0 and the variance 1.

    >>> mean, var = moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), dims=(0,))
    >>> mean, var
    (tensor([[2., 4.]]), tensor([[1., 4.]]))
    >>> moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), (0,), torch.tensor([[True], [False]]))
    (tensor([[1., 2.]]), tensor([[0., 0.]]))
    """
    dims = tuple(d % x.dim() for d in dims)
    if x.numel() == 0:
        mean = x.mean(dims, keepdim=True)
        return mean, mean
    if mask is not None:
        return _masked_moments(x, dims, mask)
    # Relative to the first value, so that the mean of equal values is exactly that value.
    first = x.detach()[tuple(slice(1) if d in dims else slice(None) for d in range(x.dim()))]
    mean = first + (x - first).mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _masked_moments(x: Tensor, dims: tuple[int, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    x = hide(x, mask)
    kept = count(x, dims, mask)
    m = kept.clamp(min=1)
    near = (x.sum(dims, keepdim=True) / m).detach()
    mean = near + hide(x - near, mask).sum(dims, keepdim=True) / m
    var = hide(x - mean, mask).square().sum(dims, keepdim=True) / m
    return mean, torch.where(kept == 0, torch.ones_like(var), var)


def count(x: Tensor, dims: Sequence[int], mask: Tensor) -> Tensor:
    """How many values over `dims`, which stay as 1, are kept by `mask`; in x's dtype."""
    return mask.expand(x.shape).to(x.dtype).sum(tuple(dims), keepdim=True)


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """x̂ = (x - mean) / √(var + eps), the difference taken first (formula 1)."""
    return (x - mean) / torch.sqrt(var + eps)


def transform(
    normalized: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    act: str | None = None,
    act_param: float | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """act(weight * normalized + bias + residual), parameters seen as `shape`; 0 where masked."""
    y = normalized
    if weight is not None:
        y = y * widen(weight).view(shape)
    if bias is not None:
        y = y + widen(bias).view(shape)
    if residual is not None:
        y = y + hide(widen(residual), mask)
    return hide(activate(y, act, act_param), mask)


def unbiased(var: Tensor, count: int) -> Tensor:
    """The unbiased variance m/(m-1)·σ² of a biased one over `count` values (formulas 3 and 4)."""
    return var * (count / (count - 1))


def running_average(running: Tensor, batch: Tensor, momentum: float) -> Tensor:
    """Formula 3, in PyTorch's direction: running = (1 - momentum)·running + momentum·batch.

    `momentum` is the weight of the *new* value: PyTorch's 0.1 is Keras' and Flax' 0.9.

    >>> running_average(torch.tensor(1.0), torch.tensor(2.0), momentum=0.1)
    tensor(1.1000)
    """
    return (1 - momentum) * running + momentum * batch


def population_statistics(batches: Iterable[Tensor], channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """The paper's inference statistics (formula 4): E[mean_B] and E[m/(m-1)·var_B] over batches.

    The plain average over equally large batches, which is what `momentum=None` accumulates.
    """
    means, variances = [], []
    for batch in batches:
        x = widen(batch).movedim(channel_dim, 0).flatten(1)
        mean, var = moments(x, (1,))
        means.append(mean[:, 0])
        variances.append(unbiased(var[:, 0], x.shape[1]))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def identity_parameters(mean: Tensor, var: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """γ = √(var + eps) and β = mean, which make the layer the identity (formula 7)."""
    return torch.sqrt(var + eps), mean

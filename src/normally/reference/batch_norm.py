"""Batch normalization as its formula.

Source of formulas 1-4: Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .activation import DERIVATIVES, act_param_of
from .normalization import hide, moments, normalize, transform, widen


def batch_norm(
    input: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    act_param: float | None = None,
    correction: int = 0,
    channel_dim: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization (Ioffe & Szegedy 2015, Algorithm 1): formulas 1, 2 and 5.

        y = act(weight * (x - mean) / √(var * m / (m - correction) + eps) + bias + residual)

    The mean and the biased variance of a channel are taken over the m values of the batch and of
    all positions (N·H·W for an image), unless they are given: evaluation mode.

    Args:
        input: `(N, C, *)`, or the channel at `channel_dim`.
        mean: `(C,)`, in units of x; None takes the batch's.
        var: `(C,)`, in units of x²; None takes the batch's.
        weight: γ, `(C,)`; None is 1.
        bias: β, `(C,)`; None is 0.
        eps: in units of x².
        residual: added before the activation; the input's shape.
        act: a name of `ACTIVATIONS`.
        act_param: leaky_relu's slope, elu's alpha.
        correction: 1 normalizes by the unbiased variance, as tiny-dnn does. Only for the batch's.
        channel_dim: the dimension of C.
        mask: bool, broadcastable to `input`, of size 1 at the channel; False enters no statistic
            and gives 0.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    channel_dim %= input.dim()
    x = hide(widen(input), mask)
    shape = [-1 if d == channel_dim else 1 for d in range(x.dim())]
    mean, var, _ = _statistics(x, mean, var, correction, channel_dim, mask)
    y = normalize(x, mean, var, eps)
    y = transform(y, weight, bias, shape, act, act_param, residual=residual, mask=mask)
    return y.to(input.dtype)


def _statistics(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    correction: int,
    channel_dim: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and normalizing variance a channel, given or the batch's, and the values a channel."""
    dims = [d for d in range(x.dim()) if d != channel_dim]
    m: Tensor | int
    if mask is None:
        m = math.prod(x.shape[d] for d in dims)
    else:
        m = mask.to(x.dtype).sum().clamp(min=1 + correction)
    if mean is not None and var is not None:
        shape = [-1 if d == channel_dim else 1 for d in range(x.dim())]
        return widen(mean).view(shape), widen(var).view(shape), m
    mean, var = moments(x, dims, mask)
    return mean, var * (m / (m - correction)) if correction else var, m


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    act_param: float | None = None,
    correction: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivative of `batch_norm`, written out; the channel is dimension 1.

        g        = grad_output * act'(z),  z = weight * x̂ + bias + residual
        residual : g
        bias     : Σ g
        weight   : Σ g x̂
        input    : weight / √(var + eps) * (g - mean(g) - x̂ * mean(g x̂))    in training,
                   weight / √(var + eps) * g                                in evaluation

    where with a correction the last mean divides by m - correction. The batch's statistics are
    computed here, from `input`, so that this function has a complete derivative of its own.

    Returns:
        The gradients of input, residual, weight and bias, in float64.
    """
    x, g = hide(widen(input), mask), hide(widen(grad_output), mask)
    training = mean is None or var is None
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var, m = _statistics(x, mean, var, correction, 1, mask)
    rstd = 1 / torch.sqrt(var + eps)
    normalized = hide((x - mean) * rstd, mask)
    scale = rstd if weight is None else rstd * widen(weight).view(shape)
    if act is not None:
        z = normalized if weight is None else normalized * widen(weight).view(shape)
        if bias is not None:
            z = z + widen(bias).view(shape)
        if residual is not None:
            z = z + hide(widen(residual), mask)
        slope = DERIVATIVES[act](z, act_param_of(act, act_param))
        g = torch.where(slope == 0, torch.zeros_like(g), g * slope)
    grad_weight, grad_bias = (g * normalized).sum(dims), g.sum(dims)
    grad_input = g
    if training:
        grad_input = g - (
            grad_bias.view(shape) / m + normalized * grad_weight.view(shape) / (m - correction)
        )
    return hide(grad_input, mask) * scale, g, grad_weight, grad_bias

"""Every normalization as its formula: slow, obvious, and the oracle of the tests.

The functions here are plain torch expressions. They widen to float64 first and narrow once at the
end, so they are differentiable any number of times, run on any device that has float64, and say
what the compiled kernels must compute. Where there is no kernel they are also what runs.

Source of formulas 1-4: Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_ACT_PARAM",
    "DERIVATIVES",
    "act_param_of",
    "activate",
    "batch_norm",
    "batch_norm_backward",
    "identity_parameters",
    "layer_norm",
    "moments",
    "normalize",
    "population_statistics",
    "running_average",
    "unbiased",
    "widen",
]

#: The activations that a norm can be fused with, by name: z and the parameter to act(z).
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    # Spelled out: torch's own derivatives of these two use 1/6 in float32 even for float64.
    "hardswish": lambda z, _: z * (F.hardtanh(z, -3, 3) + 3) / 6,
    "hardsigmoid": lambda z, _: (F.hardtanh(z, -3, 3) + 3) / 6,
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
}


def _silu_slope(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_slope(z: Tensor, _: float) -> Tensor:
    cdf = 0.5 * torch.erfc(z * -math.sqrt(0.5))
    return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(z: Tensor, _: float) -> Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)


def _where(condition: Tensor, yes: Tensor | float, no: Tensor | float, z: Tensor) -> Tensor:
    """torch.where of numbers in z's dtype."""
    return torch.where(
        condition, torch.as_tensor(yes, dtype=z.dtype), torch.as_tensor(no, dtype=z.dtype)
    )


#: Their derivatives by z; at a kink the one that torch takes.
DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: _where(z <= 0, 0, 1, z),
    "relu6": lambda z, _: _where((z > 0) & (z < 6), 1, 0, z),
    "leaky_relu": lambda z, slope: _where(z > 0, 1, slope, z),
    "elu": lambda z, alpha: _where(z > 0, 1, alpha * torch.exp(z.clamp(max=0)), z),
    "silu": _silu_slope,
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "hardswish": lambda z, _: _where(z <= -3, 0, _where(z < 3, z / 3 + 0.5, 1, z), z),
    "hardsigmoid": lambda z, _: _where((z > -3) & (z < 3), 1 / 6, 0, z),
    "sigmoid": lambda z, _: torch.sigmoid(z) * (1 - torch.sigmoid(z)),
    "tanh": lambda z, _: 1 - torch.tanh(z).square(),
}

#: The parameter where the caller gives none: leaky_relu's slope below 0 and elu's alpha.
DEFAULT_ACT_PARAM = {"leaky_relu": 0.01, "elu": 1.0}


def widen(x: Tensor) -> Tensor:
    """`x` in the widest floating dtype of its device: float64, but float32 on MPS."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def act_param_of(act: str, act_param: float | None) -> float:
    """The parameter of an activation, its default for None."""
    return DEFAULT_ACT_PARAM.get(act, 0.0) if act_param is None else act_param


def activate(z: Tensor, act: str | None, act_param: float | None = None) -> Tensor:
    """act(z), the identity for None.

    >>> activate(torch.tensor([-2.0, 3.0]), "leaky_relu", 0.1)
    tensor([-0.2000,  3.0000])
    """
    if act is None:
        return z
    return ACTIVATIONS[act](z, act_param_of(act, act_param))


def moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`, which stay as 1 (formulas 1 and 2).

        mean = Σx / m        var = Σ(x - mean)² / m

    >>> mean, var = moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), dims=(0,))
    >>> mean, var
    (tensor([[2., 4.]]), tensor([[1., 4.]]))
    """
    dims = tuple(d % x.dim() for d in dims)
    if x.numel() == 0:
        mean = x.mean(dims, keepdim=True)
        return mean, mean
    # Relative to the first value, so that the mean of equal values is exactly that value.
    first = x.detach()[tuple(slice(1) if d in dims else slice(None) for d in range(x.dim()))]
    mean = first + (x - first).mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """x̂ = (x - mean) / √(var + eps), the difference taken first (formula 1)."""
    return (x - mean) / torch.sqrt(var + eps)


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

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    x = widen(input)
    channel_dim %= x.dim()
    shape = [-1 if d == channel_dim else 1 for d in range(x.dim())]
    mean, var, _ = _statistics(x, mean, var, correction, channel_dim)
    y = normalize(x, mean, var, eps)
    if weight is not None:
        y = y * widen(weight).view(shape)
    if bias is not None:
        y = y + widen(bias).view(shape)
    if residual is not None:
        y = y + widen(residual)
    return activate(y, act, act_param).to(input.dtype)


def _statistics(
    x: Tensor, mean: Tensor | None, var: Tensor | None, correction: int, channel_dim: int
) -> tuple[Tensor, Tensor, int]:
    """Mean and normalizing variance a channel, given or the batch's, and the values a channel."""
    dims = [d for d in range(x.dim()) if d != channel_dim]
    m = math.prod(x.shape[d] for d in dims)
    if mean is not None and var is not None:
        shape = [-1 if d == channel_dim else 1 for d in range(x.dim())]
        return widen(mean).view(shape), widen(var).view(shape), m
    mean, var = moments(x, dims)
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
    x, g = widen(input), widen(grad_output)
    training = mean is None or var is None
    shape = [1, -1] + [1] * (x.dim() - 2)
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var, m = _statistics(x, mean, var, correction, 1)
    rstd = 1 / torch.sqrt(var + eps)
    normalized = (x - mean) * rstd
    scale = rstd if weight is None else rstd * widen(weight).view(shape)
    if act is not None:
        z = normalized if weight is None else normalized * widen(weight).view(shape)
        if bias is not None:
            z = z + widen(bias).view(shape)
        if residual is not None:
            z = z + widen(residual)
        slope = DERIVATIVES[act](z, act_param_of(act, act_param))
        g = torch.where(slope == 0, torch.zeros_like(g), g * slope)
    grad_weight, grad_bias = (g * normalized).sum(dims), g.sum(dims)
    grad_input = g
    if training:
        grad_input = g - (
            grad_bias.view(shape) / m + normalized * grad_weight.view(shape) / (m - correction)
        )
    return grad_input * scale, g, grad_weight, grad_bias


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


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450): formula 6.

    Mean and biased variance of each sample over the last `len(normalized_shape)` dimensions; the
    same in training and in evaluation.
    """
    x = widen(input)
    mean, var = moments(x, range(-len(normalized_shape), 0))
    y = normalize(x, mean, var, eps)
    if weight is not None:
        y = y * widen(weight)
    if bias is not None:
        y = y + widen(bias)
    return y.to(input.dtype)


def identity_parameters(mean: Tensor, var: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """γ = √(var + eps) and β = mean, which make the layer the identity (formula 7)."""
    return torch.sqrt(var + eps), mean

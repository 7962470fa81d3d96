"""The activations that a norm can be fused with, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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

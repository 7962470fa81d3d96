"""quack: RMS and layer norm in CuTe, for Hopper and later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..operator import Case, Operator
from .library import Library, eps_of


class _RMSNorm(nn.Module):
    """y, or with a residual y and the sum."""

    def __init__(self, function: Any, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """By quack's function."""
        if residual is None:
            return self.function(input, self.weight, eps=self.eps)
        return self.function(input, self.weight, residual=residual, eps=self.eps, prenorm=True)


class _LayerNorm(nn.Module):
    """Without a backward."""

    def __init__(self, function: Any, width: int, eps: float) -> None:
        super().__init__()
        self.function = function
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Any:
        """By quack's function."""
        return self.function(input, self.weight.detach(), self.bias.detach(), self.eps)


class Quack(Library):
    """Its RMS norm, add and RMS norm, and the forward of its layer norm."""

    name = "quack"
    package = "quack-kernels"
    modules = ("quack", "quack.rmsnorm")

    def has(self, operator: Operator, case: Case) -> bool:
        """Rows alone."""
        if operator.name == "layer_norm":
            return case.mode == "forward"
        return operator.name in ("rms_norm", "add_rms_norm")

    def build(self, operator: Operator, case: Case) -> nn.Module:
        """A layer with γ = 1 and β = 0."""
        width, eps = case.shape.size[-1], eps_of(operator, case)
        if operator.name == "layer_norm":
            return _LayerNorm(self.get("quack.rmsnorm:layernorm_fwd"), width, eps)
        return _RMSNorm(self.get("quack:rmsnorm"), width, eps, case.torch_dtype)

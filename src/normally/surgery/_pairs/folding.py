"""What `fold` does to a layer and the norm behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...reference import activate
from .. import _foreign
from .._evaluation import flag
from .carry_out import Group
from .folds import Fold

VERB = "fold"

_TRANSPOSED = (
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip


class FoldedNorm(torch.nn.Identity):
    """What is left of a norm that was folded: what it did behind the normalization.

        y = act(input + residual)

    It has neither parameters nor statistics; `act` is a module, where the norm had an activation.
    """

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """The input, with what the caller adds and the activation."""
        if mask is not None or lengths is not None:
            raise ValueError(
                "FoldedNorm: mask and lengths must be None: the statistics are in the weights of "
                "the layer before, and what is masked cannot be left out of them."
            )
        output = input if residual is None else input + residual
        own = self._modules.get("act")
        if own is not None:
            output = own(output)
        return activate(output, act, act_param)


def plan(group: Group[Fold]) -> Callable[[torch.nn.Module], None]:
    """What folds a group's norms in its owner, or in a copy of it."""

    def change(owner: Any) -> None:
        for fold in group.findings:
            norm = owner.get_submodule(group.inside(fold.path))
            weights = owner.get_submodule(group.inside(fold.weights_path))
            scale, shift = affine(norm)
            _absorb(weights, scale, shift)
            _empty(norm)

    return change


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that the norm is in evaluation, in float64.

        y = x * scale + shift,  scale = weight / √(running_var + eps),
        shift = bias - running_mean * scale

    Returns:
        Both `(C,)`.
    """
    recipe = getattr(norm, "_recipe", None)
    eps = getattr(norm, recipe.eps_name) if isinstance(recipe, _foreign.Recipe) else norm.eps
    rstd = (norm.running_var.double() + eps).rsqrt()
    scale = rstd if norm.weight is None else rstd * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    bias = getattr(norm, "bias", None)
    return scale.detach(), (shift if bias is None else shift + bias.double()).detach()


@torch.no_grad()
def _absorb(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Make the layer give scale * its output + shift, for scales and shifts of its channels."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, *): the outputs of a group belong to its inputs.
        by_group = scale.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
        wide = weight.double().view(layer.groups, -1, *weight.shape[1:]) * by_group
        folded = wide.view(weight.shape)
    else:
        folded = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
    weight.copy_(folded)
    if bias is None:
        layer.bias = torch.nn.Parameter(
            shift.to(weight.dtype), requires_grad=bool(weight.requires_grad)
        )
    else:
        bias.copy_(bias.double() * scale + shift)


def _empty(norm: Any) -> None:
    """Make it a `FoldedNorm`, in place: it stays in all places where it is."""
    act = activation_module(norm)
    training = flag(norm)
    norm.__class__ = FoldedNorm
    norm.__dict__ = torch.nn.Identity().__dict__
    norm.training = training
    if act is not None:
        norm.act = act


def activation_module(norm: Any) -> torch.nn.Module | None:
    """The norm's activation as one of torch's modules, writing into the layer's output."""
    child: torch.nn.Module | None = norm._modules.get("act")
    recipe = getattr(norm, "_recipe", None)
    if isinstance(recipe, _foreign.Recipe) and recipe.act is not None:
        if child is None or isinstance(child, torch.nn.Identity):
            return _module_of(*recipe.act)
        return child
    if child is not None:
        return None if isinstance(child, torch.nn.Identity) else child
    act = getattr(norm, "act", None)
    return _module_of(act, norm.act_param) if isinstance(act, str) else None


def _module_of(act: str, param: float | None) -> torch.nn.Module:
    if act == "leaky_relu":
        return torch.nn.LeakyReLU(0.01 if param is None else param, inplace=True)
    if act == "elu":
        return torch.nn.ELU(1.0 if param is None else param, inplace=True)
    modules: dict[str, Callable[[], torch.nn.Module]] = {
        "relu": lambda: torch.nn.ReLU(inplace=True),
        "relu6": lambda: torch.nn.ReLU6(inplace=True),
        "silu": lambda: torch.nn.SiLU(inplace=True),
        "gelu": torch.nn.GELU,
        "gelu_tanh": lambda: torch.nn.GELU(approximate="tanh"),
        "hardswish": lambda: torch.nn.Hardswish(inplace=True),
        "hardsigmoid": lambda: torch.nn.Hardsigmoid(inplace=True),
        "sigmoid": torch.nn.Sigmoid,
        "tanh": torch.nn.Tanh,
    }
    return modules[act]()

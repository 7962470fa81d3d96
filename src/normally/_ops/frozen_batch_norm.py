"""`normally::frozen_batch_norm`: batch norm in evaluation whose backward needs no input.

    frozen_batch_norm(input, mean, var, weight, bias, mask, eps) -> output

The kernel is `batch_norm`'s. The derivative by x is the same operator of the gradient, with mean 0
and without bias, so that it can be differentiated any number of times and nothing of the input's
size is saved. Only the derivative by γ and β needs the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from . import batch_norm
from ._library import LIBRARY, EagerFunction, define, map_elements, record


def _forward(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    output: Tensor
    output, *_ = record(
        batch_norm.forward, input, weight, bias, None, mask, mean, var, eps, 0, 0, 0.0, False
    )
    return output


operator = define(
    "frozen_batch_norm(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "Tensor? mask, float eps) -> Tensor",
    fallback=_forward,
    fake=lambda input, *_: torch.empty_like(input),
)


def frozen_batch_norm(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    """The output, by the route that fits: compiled, transformed or eager."""
    output: Tensor
    arguments = (input, mean, var, weight, bias, mask, eps)
    learns = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    if mean.requires_grad or var.requires_grad:
        raise _not_constant()
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        # batch_norm has a kernel for the derivative by γ and β.
        output = _forward(*arguments) if learns else record(operator, *arguments)
    elif forward_ad._current_level >= 0:
        # Operators have no forward-mode formula; the plain expression does.
        output = reference.batch_norm(input, mean, var, weight, bias, eps, mask=mask)
    elif torch._C._are_functorch_transforms_active():
        output = TransformableFrozenBatchNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    elif learns and torch.is_grad_enabled():
        output = _forward(*arguments)
    elif input.requires_grad and torch.is_grad_enabled():
        output = EagerFrozenBatchNorm.apply(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output = _forward(*arguments)
    return output


def _not_constant() -> ValueError:
    return ValueError(
        "frozen_batch_norm: running_mean and running_var must be constants. Got one that requires "
        "a gradient; pass running_mean.detach(), or write the formula out."
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, mean, var, weight, bias, mask, ctx.eps = inputs
    needs = ctx.needs_input_grad
    if needs[1] or needs[2]:
        raise _not_constant()
    ctx.save_for_backward(input if needs[3] or needs[4] else None, mean, var, weight, bias, mask)


def _differentiate(
    ctx: Any, grad_output: Tensor, call: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients; that of x by `call`, this operator in one of its forms."""
    input, mean, var, weight, bias, mask = ctx.saved_tensors
    zero = torch.zeros_like(mean)
    grad_input = call(grad_output, zero, var, weight, None, mask, ctx.eps)
    if input is None:
        return (grad_input, *(None,) * 6)
    dims = [d for d in range(input.dim()) if d != 1]
    shape = [-1, *(1,) * (input.dim() - 2)]
    x, g = (reference.hide(reference.widen(t), mask) for t in (input, grad_output))
    rstd = (reference.widen(var) + ctx.eps).rsqrt()
    grad_weight = (g * (x - mean.view(shape)) * rstd.view(shape)).sum(dims)
    return (
        grad_input, None, None,
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else g.sum(dims).to(bias.dtype),
        None, None,
    )  # fmt: skip


torch.library.register_autograd(
    "normally::frozen_batch_norm",
    lambda ctx, grad_output: _differentiate(ctx, grad_output, operator),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    lib=LIBRARY,
)
torch.library.register_vmap("normally::frozen_batch_norm", map_elements(operator), lib=LIBRARY)


class EagerFrozenBatchNorm(EagerFunction):
    """The derivative by x alone, for plain eager autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(mean, var, weight, mask)
        ctx.eps = eps
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(input, mean, var, weight, bias, mask, eps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight, mask = ctx.saved_tensors
        zero = torch.zeros_like(mean)
        return frozen_batch_norm(grad_output, zero, var, weight, None, mask, ctx.eps), *(None,) * 6


class TransformableFrozenBatchNorm(torch.autograd.Function):
    """The derivative in the form that `torch.func` transforms can take apart and nest."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad_output, TransformableFrozenBatchNorm.apply)

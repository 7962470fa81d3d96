"""`frozen_batch_norm`: a fixed scale and shift a channel, which saves no input for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from .._ops import batch_norm as ops
from ._checks import check_eps, check_input, check_of_channels, is_tracing
from ._masks import prepare_mask


def frozen_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization with constants: what fine-tuning a detector keeps of batch norm.

        y = weight * (x - running_mean) / √(running_var + eps) + bias

    One multiply-add a value. The derivative needs no x, so none is saved: the backward is the same
    function of the gradient, without the shifts.

    Args:
        input: `(N, C, *)`; float64, float32, bfloat16 or float16, any strides.
        running_mean: `(C,)`, in units of x.
        running_var: `(C,)`, in units of x².
        weight: γ, `(C,)`, of the input's dtype, or float32 for a half input. None is 1. If it
            requires a gradient it gets one, and then the input is saved.
        bias: β, `(C,)`, likewise. None is 0.
        eps: added to the variance, in units of x².
        mask: bool, True where a position counts; broadcastable to `(N, *)`, or `(N, 1, *)`. Masked
            positions give 0 and get a gradient of 0, whatever they hold.
        lengths: `(N,)` integers instead of a mask, for `(N, C, L)`: the first lengths[n] positions
            count.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes and eps that make no sense, and for running statistics that require
            a gradient.
        TypeError: for dtypes that do not go together.

    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> frozen_batch_norm(x, torch.tensor([2.0, 20.0]), torch.tensor([4.0, 4.0]), eps=0.0)
    tensor([[-0.5000, -5.0000],
            [ 0.5000,  5.0000]])
    """
    check_input(input, "frozen_batch_norm")
    check_eps(eps, "frozen_batch_norm")
    if input.dim() < 2:
        raise ValueError(
            "frozen_batch_norm: input must have at least 2 dimensions (N, C, *). "
            f"Got {input.dim()}D input."
        )
    tensors = (running_mean, running_var, weight, bias)
    if not is_tracing():
        names = ("running_mean", "running_var", "weight", "bias")
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                check_of_channels(name, tensor, input, "frozen_batch_norm")
    if running_mean.requires_grad or running_var.requires_grad:
        raise _not_constant()
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, 1, "frozen_batch_norm")
    return _normalize(input, *tensors, mask, eps)


def _normalize(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    """By the route that fits: compiled, transformed or eager."""
    learns = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    compiles = torch.compiler.is_compiling()
    if is_tracing() or (compiles and learns):  # the operator, which has every derivative itself
        return _forward(input, mean, var, weight, bias, mask, eps)
    if forward_ad._current_level >= 0:
        # Operators have no forward-mode formula; the plain expression does.
        return reference.batch_norm(input, mean, var, weight, bias, eps, mask=mask)
    if compiles or learns or torch._C._are_functorch_transforms_active():
        arguments = (input, mean, var, weight, bias, mask, eps)
        return _Frozen.apply(*arguments)  # type: ignore[no-untyped-call,no-any-return]
    if input.requires_grad and torch.is_grad_enabled():
        return _EagerFrozen.apply(input, mean, var, weight, bias, mask, eps)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(input, mean, var, weight, bias, mask, eps)


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
    output, *_ = ops.forward(input, weight, bias, None, mask, mean, var, eps, 0, 0, 0.0, False)
    return output


def _not_constant() -> ValueError:
    return ValueError(
        "frozen_batch_norm: running_mean and running_var must be constants. Got one that requires "
        "a gradient; pass running_mean.detach(), or write the formula out."
    )


class _EagerFrozen(torch.autograd.Function):
    """The derivative of x alone, for plain eager autograd."""

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        """Without the base class's look for functorch, which the caller has done: 3 µs."""
        output: Tensor = super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        return output

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
        """Saves nothing of the input's size."""
        ctx.save_for_backward(mean, var, weight, mask)
        ctx.eps = eps
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(input, mean, var, weight, bias, mask, eps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The same function, so that it can be differentiated as often as asked."""
        mean, var, weight, mask = ctx.saved_tensors
        zero = torch.zeros_like(mean)
        return _normalize(grad_output, zero, var, weight, None, mask, ctx.eps), *(None,) * 6


class _Frozen(torch.autograd.Function):
    """The derivative in the form that compilers and `torch.func` take apart, of γ and β as well."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """The input is saved only for the derivative of a parameter."""
        input, mean, var, weight, bias, mask, ctx.eps = inputs
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise _not_constant()
        learns = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(input if learns else None, mean, var, weight, bias, mask)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The same function of the gradient; sums for γ and β as plain expressions."""
        input, mean, var, weight, bias, mask = ctx.saved_tensors
        zero = torch.zeros_like(mean)
        grad_input = _Frozen.apply(  # type: ignore[no-untyped-call]
            grad_output, zero, var, weight, None, mask, ctx.eps
        )
        if input is None:
            return grad_input, *(None,) * 6
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

"""The derivatives of batch norm's operators: registered, and for eager autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._library import LIBRARY, EagerFunction, vjp
from .batch_norm import (
    NEED_INPUT,
    NEED_PARAMETERS,
    NEED_RESIDUAL,
    backward,
    formula_of,
)


def remember(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    stats: Tensor,
    bits: Tensor,
    config: tuple[Any, ...],
) -> None:
    """Save for backward what it reads: the residual only where its gradient reads it.

    Nor the input, in evaluation without gradients of γ and β: dx = act′(z) · dy · scale, and act′
    is 1 or in the bits. Then its strides are kept, which the bits follow.
    """
    input, weight, bias, residual, mask = tensors
    has_bits = bits.numel() > 0
    needs_z = config[3] and not has_bits
    trains = config[0] is not False  # or is the group that it does so with
    needs_input = needs_z or trains or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.strides = None if needs_input or input is None else input.stride()
    ctx.save_for_backward(
        input if needs_input else None, weight, bias, residual if needs_z else None, mask,
        bits if has_bits else None, stats,
    )  # fmt: skip
    ctx.config = config
    ctx.has_residual = residual is not None


def differentiate(
    ctx: Any,
    saved: tuple[Tensor | None, ...],
    grad_output: Tensor,
    call: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual by `call`, the backward operator."""
    needs = ctx.needs_input_grad
    config = ctx.config
    if ctx.strides is not None:
        # Any finite values in the input's layout do: the operator's result is free of them.
        saved = (_laid_out(grad_output, ctx.strides), *saved[1:])
    act = config[3]
    need = (
        (NEED_INPUT if needs[0] else 0)
        | (NEED_PARAMETERS if needs[1] or needs[2] else 0)
        | (NEED_RESIDUAL if act and needs[3] else 0)
    )
    grad_input, grad_residual, grad_weight, grad_bias = call(grad_output, *saved, *config, need)
    if ctx.has_residual and not act:
        grad_residual = reference.hide(grad_output, saved[4])
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
        grad_residual if needs[3] else None,
    )


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, bits = output
    ctx.mark_non_differentiable(stats, bits)
    remember(ctx, inputs[:5], stats, bits, (inputs[5] is None, *inputs[7:11]))


def _autograd_backward(
    ctx: Any, grad_output: Tensor, _stats: Tensor, _bits: Tensor
) -> tuple[Tensor | None, ...]:
    return (*differentiate(ctx, ctx.saved_tensors, grad_output, backward), *(None,) * 8)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.config = inputs[8:13]


def double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *primals, mask, bits, stats = ctx.saved_tensors
    if primals[1].numel() == 0:
        return (*(None if t is None else torch.zeros_like(t) for t in primals), *(None,) * 9)
    formula = formula_of(mask, bits, stats, *ctx.config)
    gradients, pull = vjp(formula, primals)
    # What was not asked for came back empty: its cotangent is zero.
    cotangents = tuple(
        c.to(g.dtype) if c is not None and c.shape == g.shape else torch.zeros_like(g)
        for c, g in zip(grads, gradients, strict=True)
    )
    return (*pull(cotangents), *(None,) * 9)


torch.library.register_autograd(
    "normally::batch_norm",
    _autograd_backward,
    setup_context=lambda ctx, inputs, output: save(ctx, inputs, output),
    lib=LIBRARY,
)
torch.library.register_autograd(
    "normally::batch_norm_backward",
    double_backward,
    setup_context=lambda ctx, inputs, output: save_backward(ctx, inputs, output),
    lib=LIBRARY,
)


class EagerBatchNorm(EagerFunction):
    """The same derivative for plain eager autograd.

    The operator's own registration costs 15 µs a step more, which is what a small tensor costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
        arguments: tuple[Any, ...],
        config: tuple[bool, float, int, int, float],
    ) -> Tensor:
        """`operator` is this file's `forward` or `forward_and_update`, called below autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            output, stats, bits = operator(input, weight, bias, residual, mask, *arguments)
        remember(ctx, (input, weight, bias, residual, mask), stats, bits, config)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable itself where the caller asked for a graph."""
        # Outside of the guard below: unpacking may run a checkpointed forward, with autograd.
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = differentiate(ctx, saved, grad_output, backward)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = differentiate(ctx, saved, grad_output, backward)
        return (*gradients, None, None, None, None)

"""`normally::batch_norm` and its backward: schemas, shapes, autograd, fallback.

    batch_norm(input, weight, bias, residual, mask, mean, var, …) -> (output, stats, bits)

`stats` is (3, C) float64, the mean and the biased variance that were used and the number of values:
those of the batch, or copies of `mean` and `var` where they are given (evaluation). A copy, so that
a buffer which changes between forward and backward cannot break autograd.

`mask` is bool, 1 in place of C and otherwise broadcastable to the input: False enters no statistic
and gives 0.

`bits` replaces the residual in the backward of a piecewise linear activation: one bit an element,
1 where the derivative is 1. It is empty unless `save_bits` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import activation, running_stats
from ._library import LIBRARY, define
from .bits import bits_shape, unpack_bits

# What the backward must compute, as bits of `need`.
NEED_INPUT, NEED_PARAMETERS, NEED_RESIDUAL = 1, 2, 4


def _forward_fallback(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if save_bits:
        raise RuntimeError("normally::batch_norm: only compiled kernels save bits.")
    output = torch.empty_like(input)
    no_bits = input.new_empty((0, 0), dtype=torch.uint8)
    if input.numel() == 0:
        return output, _stats_like(input).zero_(), no_bits
    output.copy_(
        reference.batch_norm(
            input, mean, var, weight, bias, eps, residual=residual, mask=mask,
            correction=correction, **activation.decode(act, act_param),
        )
    )  # fmt: skip
    if mean is None or var is None:
        return output, batch_statistics(input, mask), no_bits
    given = torch.stack((mean, var, torch.zeros_like(mean)))
    return output, given.to(_stats_dtype(input)), no_bits


def batch_statistics(input: Tensor, mask: Tensor | None) -> Tensor:
    """The batch's mean, biased variance and number of values, (3, C)."""
    x = reference.widen(input)
    dims = [d for d in range(input.dim()) if d != 1]
    mean, var = reference.moments(x, dims, mask)
    if mask is None:
        count = torch.full_like(mean, input.numel() / input.shape[1])
    else:
        count = mask.expand(input[:, :1].shape).to(x.dtype).sum().expand_as(mean)
    return torch.stack((mean.flatten(), var.flatten(), count.flatten()))


def _stats_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if input.device.type == "mps" else torch.float64


def _stats_like(input: Tensor) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=_stats_dtype(input))


def _forward_fake(
    input: Tensor,
    weight: Any,
    bias: Any,
    residual: Any,
    mask: Any,
    mean: Any,
    var: Any,
    eps: Any,
    correction: Any,
    act: Any,
    act_param: Any,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(input)
    bits = input.new_empty(bits_shape(output) if save_bits else (0, 0), dtype=torch.uint8)
    return output, _stats_like(input), bits


forward = define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "Tensor? mean, Tensor? var, float eps, int correction, int act, float act_param, "
    "bool save_bits) -> (Tensor output, Tensor stats, Tensor bits)",
    fallback=_forward_fallback,
    fake=_forward_fake,
)


def _forward_and_update_fallback(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_updates: Tensor | None,
    momentum: float | None,
    unbiased: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = forward(
        input, weight, bias, residual, mask, None, None, eps, correction, act, act_param, save_bits
    )
    running_stats.update(
        running_mean, running_var, num_batches_tracked, skipped_updates, result[1],
        momentum, unbiased,
    )  # fmt: skip
    return result


def _forward_and_update_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    unused = (None,) * 10
    return _forward_fake(input, *unused, save_bits=args[-1])


# `batch_norm` in training and `update_running_stats_` in one call, which saves 4 µs where the call
# is the cost. Eager only: a graph wants the functional operator and the mutation apart.
forward_and_update = define(
    "batch_norm_and_update_(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_updates, float? momentum, "
    "bool unbiased, float eps, int correction, int act, float act_param, bool save_bits) "
    "-> (Tensor output, Tensor stats, Tensor bits)",
    fallback=_forward_and_update_fallback,
    fake=_forward_and_update_fake,
)


def _formula(
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> Callable[..., tuple[Tensor, ...]]:
    """The backward as a plain torch expression of (grad_output, input, weight, bias, residual)."""
    mean, var = (None, None) if training else stats[:2].unbind()

    def backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, ...]:
        kept = act
        if bits is not None:  # then act'(z) is a constant, and only the affine part is left
            passes = unpack_bits(bits, torch.empty_like(input))
            grad_output = torch.where(passes, grad_output, grad_output * act_param)
            kept = 0
        return reference.batch_norm_backward(
            grad_output, input, mean, var, weight, bias, eps, residual=residual, mask=mask,
            correction=correction, **activation.decode(kept, act_param),
        )  # fmt: skip

    return backward


def _backward_fallback(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = _backward_fake(
        grad_output, input, weight, bias, residual, mask, bits, stats, training, eps, correction,
        act, act_param, need,
    )  # fmt: skip
    if input.numel() == 0:
        for gradient in result:
            gradient.zero_()
        return result
    gradients = plain_backward(
        grad_output, input, weight, bias, residual, mask, bits, stats, training, eps, correction,
        act, act_param, need,
    )  # fmt: skip
    for target, gradient in zip(result, gradients, strict=True):
        if target.shape == gradient.shape:
            target.copy_(gradient)
    return result


def plain_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """The backward as torch expressions; every gradient, asked for or not."""
    formula = _formula(mask, bits, stats, *settings[:-1])
    return formula(grad_output, input, weight, bias, residual)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: int) -> Tensor:
        wanted = tensor is not None and need & needed
        return torch.empty_like(tensor) if wanted else input.new_empty(0)  # type: ignore[arg-type]

    return (
        like(input, NEED_INPUT),
        like(input, NEED_RESIDUAL),
        like(weight, NEED_PARAMETERS),
        like(bias, NEED_PARAMETERS),
    )


backward = define(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor? bits, Tensor stats, bool training, float eps, "
    "int correction, int act, float act_param, int need) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    fallback=_backward_fallback,
    fake=_backward_fake,
)


def _remember(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    stats: Tensor,
    bits: Tensor,
    config: tuple[bool, float, int, int, float],
) -> None:
    """Save for backward what it reads: the residual only where its gradient reads it."""
    input, weight, bias, residual, mask = tensors
    has_bits = bits.numel() > 0
    kept = residual if config[3] and not has_bits else None
    ctx.save_for_backward(input, weight, bias, kept, mask, bits if has_bits else None, stats)
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


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, bits = output
    ctx.mark_non_differentiable(stats, bits)
    _remember(ctx, inputs[:5], stats, bits, (inputs[5] is None, *inputs[7:11]))


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
    formula = _formula(mask, bits, stats, *ctx.config)
    present = [t for t in primals if t is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return formula(*(next(given) if t is not None else None for t in primals))

    gradients, vjp = torch.func.vjp(of_present, *present)  # type: ignore[misc]
    # What was not asked for came back empty: its cotangent is zero.
    cotangents = tuple(
        c.to(g.dtype) if c is not None and c.shape == g.shape else torch.zeros_like(g)
        for c, g in zip(grads, gradients, strict=True)
    )
    second = iter(vjp(cotangents))
    result = tuple(next(second) if t is not None else None for t in primals)
    return (*result, *(None,) * 9)


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


class EagerBatchNorm(torch.autograd.Function):
    """The same derivative without the dispatcher's Python round trips, for plain eager autograd.

    The operator's own registration costs 15 µs a step more, which is what a small tensor costs.
    """

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        """Without the base class's look for functorch, which the caller has done: 3 µs."""
        output: Tensor = super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        return output

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
        _remember(ctx, (input, weight, bias, residual, mask), stats, bits, config)
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

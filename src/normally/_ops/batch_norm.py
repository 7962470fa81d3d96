"""`normally::batch_norm` and its backward: schemas, shapes, autograd, fallback.

    batch_norm(input, weight, bias, residual, mean, var, …) -> (output, stats, mask)

`stats` is (2, C) float64, the mean and the biased variance that were used: those of the batch, or
copies of `mean` and `var` where they are given (evaluation). A copy, so that a buffer which changes
between forward and backward cannot break autograd.

`mask` replaces the residual in the backward of a piecewise linear activation: one bit an element,
1 where the derivative is 1. It is empty unless `save_mask` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import activation, running_stats
from ._library import LIBRARY, define
from .mask import mask_shape, unpack_mask

# What the backward must compute, as bits of `need`.
NEED_INPUT, NEED_PARAMETERS, NEED_RESIDUAL = 1, 2, 4


def _forward_fallback(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if save_mask:
        raise RuntimeError("normally::batch_norm: only compiled kernels save masks.")
    output = torch.empty_like(input)
    no_mask = input.new_empty((0, 0), dtype=torch.uint8)
    if input.numel() == 0:
        return output, _stats_like(input).zero_(), no_mask
    output.copy_(
        reference.batch_norm(
            input, mean, var, weight, bias, eps,
            residual=residual, correction=correction, **activation.decode(act, act_param),
        )
    )  # fmt: skip
    if mean is None or var is None:
        return output, batch_statistics(input), no_mask
    return output, torch.stack((mean, var)).to(_stats_dtype(input)), no_mask


def batch_statistics(input: Tensor) -> Tensor:
    """The batch's mean and biased variance, (2, C)."""
    dims = [d for d in range(input.dim()) if d != 1]
    mean, var = reference.moments(reference.widen(input), dims)
    return torch.stack((mean.flatten(), var.flatten()))


def _stats_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if input.device.type == "mps" else torch.float64


def _stats_like(input: Tensor) -> Tensor:
    return input.new_empty((2, input.shape[1]), dtype=_stats_dtype(input))


def _forward_fake(
    input: Tensor,
    weight: Any,
    bias: Any,
    residual: Any,
    mean: Any,
    var: Any,
    eps: Any,
    correction: Any,
    act: Any,
    act_param: Any,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(input)
    mask = input.new_empty(mask_shape(output) if save_mask else (0, 0), dtype=torch.uint8)
    return output, _stats_like(input), mask


forward = define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, "
    "Tensor? var, float eps, int correction, int act, float act_param, bool save_mask) "
    "-> (Tensor output, Tensor stats, Tensor mask)",
    fallback=_forward_fallback,
    fake=_forward_fake,
)


def _forward_and_update_fallback(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
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
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = forward(
        input, weight, bias, residual, None, None, eps, correction, act, act_param, save_mask
    )
    count = input.numel() // max(1, input.shape[1])
    running_stats.update(
        running_mean, running_var, num_batches_tracked, skipped_updates, result[1], count,
        momentum, unbiased,
    )  # fmt: skip
    return result


def _forward_and_update_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    unused = (None,) * 9
    return _forward_fake(input, *unused, save_mask=args[-1])


# `batch_norm` in training and `update_running_stats_` in one call, which saves 4 µs where the call
# is the cost. Eager only: a graph wants the functional operator and the mutation apart.
forward_and_update = define(
    "batch_norm_and_update_(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor(d!)? skipped_updates, float? momentum, bool unbiased, float eps, int correction, "
    "int act, float act_param, bool save_mask) -> (Tensor output, Tensor stats, Tensor mask)",
    fallback=_forward_and_update_fallback,
    fake=_forward_and_update_fake,
)


def _formula(
    mask: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> Callable[..., tuple[Tensor, ...]]:
    """The backward as a plain torch expression of (grad_output, input, weight, bias, residual)."""
    mean, var = (None, None) if training else stats.unbind()

    def backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, ...]:
        kept = act
        if mask is not None:  # then act'(z) is a constant, and only the affine part is left
            passes = unpack_mask(mask, torch.empty_like(input))
            grad_output = torch.where(passes, grad_output, grad_output * act_param)
            kept = 0
        return reference.batch_norm_backward(
            grad_output, input, mean, var, weight, bias, eps,
            residual=residual, correction=correction, **activation.decode(kept, act_param),
        )  # fmt: skip

    return backward


def _backward_fallback(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = _backward_fake(
        grad_output, input, weight, bias, residual, mask, stats, training, eps, correction,
        act, act_param, need,
    )  # fmt: skip
    if input.numel() == 0:
        for gradient in result:
            gradient.zero_()
        return result
    formula = _formula(mask, stats, training, eps, correction, act, act_param)
    gradients = formula(grad_output, input, weight, bias, residual)
    for target, gradient in zip(result, gradients, strict=True):
        if target.shape == gradient.shape:
            target.copy_(gradient)
    return result


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
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
    "Tensor? residual, Tensor? mask, Tensor stats, bool training, float eps, int correction, "
    "int act, float act_param, int need) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    fallback=_backward_fallback,
    fake=_backward_fake,
)


def _remember(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    stats: Tensor,
    mask: Tensor,
    config: tuple[bool, float, int, int, float],
) -> None:
    """Save for backward what it reads: the residual only where neither it nor a mask is spared."""
    input, weight, bias, residual = tensors
    has_mask = mask.numel() > 0
    kept = residual if config[3] and not has_mask else None
    ctx.save_for_backward(input, weight, bias, kept, mask if has_mask else None, stats)
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
        grad_residual = grad_output
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
        grad_residual if needs[3] else None,
    )


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, mask = output
    ctx.mark_non_differentiable(stats, mask)
    _remember(ctx, inputs[:4], stats, mask, (inputs[4] is None, *inputs[6:10]))


def _autograd_backward(
    ctx: Any, grad_output: Tensor, _stats: Tensor, _mask: Tensor
) -> tuple[Tensor | None, ...]:
    return (*differentiate(ctx, ctx.saved_tensors, grad_output, backward), *(None,) * 7)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.config = inputs[7:12]


def double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *primals, mask, stats = ctx.saved_tensors
    if primals[1].numel() == 0:
        return (*(None if t is None else torch.zeros_like(t) for t in primals), *(None,) * 8)
    formula = _formula(mask, stats, *ctx.config)
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
    return (*result, *(None,) * 8)


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
        operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
        arguments: tuple[Any, ...],
        config: tuple[bool, float, int, int, float],
    ) -> Tensor:
        """`operator` is this file's `forward` or `forward_and_update`, called below autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            output, stats, mask = operator(input, weight, bias, residual, *arguments)
        _remember(ctx, (input, weight, bias, residual), stats, mask, config)
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
        return (*gradients, None, None, None)

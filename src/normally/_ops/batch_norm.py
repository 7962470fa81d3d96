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
from ._library import define
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
        return output, stats_like(input).zero_(), no_bits
    output.copy_(
        reference.batch_norm(
            input, mean, var, weight, bias, eps, residual=residual, mask=mask,
            correction=correction, **activation.decode(act, act_param),
        )
    )  # fmt: skip
    if mean is None or var is None:
        return output, batch_statistics(input, mask), no_bits
    given = torch.stack((mean, var, torch.zeros_like(mean)))
    return output, given.to(stats_dtype(input)), no_bits


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


def stats_dtype(input: Tensor) -> torch.dtype:
    """What statistics of an input are kept in."""
    return torch.float32 if input.device.type == "mps" else torch.float64


def stats_like(input: Tensor) -> Tensor:
    """Uninitialized statistics of an input."""
    return input.new_empty((3, input.shape[1]), dtype=stats_dtype(input))


def forward_fake(
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
    return output, stats_like(input), bits


forward = define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "Tensor? mean, Tensor? var, float eps, int correction, int act, float act_param, "
    "bool save_bits) -> (Tensor output, Tensor stats, Tensor bits)",
    fallback=_forward_fallback,
    fake=forward_fake,
    gpu="batch_norm.forward",
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
    return forward_fake(input, *unused, save_bits=args[-1])


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
    gpu="batch_norm.forward_and_update",
)


def formula_of(
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
    result = backward_fake(
        grad_output, input, weight, bias, residual, mask, bits, stats, training, eps, correction,
        act, act_param, need,
    )  # fmt: skip
    if input.numel() == 0:
        for gradient in result:
            gradient.zero_()
        return result
    formula = formula_of(mask, bits, stats, training, eps, correction, act, act_param)
    gradients = formula(grad_output, input, weight, bias, residual)
    for target, gradient in zip(result, gradients, strict=True):
        if target.shape == gradient.shape:
            target.copy_(gradient)
    return result


def backward_fake(
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
    fake=backward_fake,
    gpu="batch_norm.backward",
)

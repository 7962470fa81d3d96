"""Batch norm over the values of several processes: operators, shapes, autograd, fallback.

    sync_batch_norm(input, weight, …, group, layer) -> (output, stats, bits)

is `batch_norm` in training with the statistics of all processes of a group, which `stats` are. It
and its backward communicate: they are torch code around operators that do not, and that are what
`batch_norm` does, cut where the processes exchange numbers.

    channel_statistics(input, mask) -> stats                   (3, C), of this process's values
    merge_statistics(messages) -> stats                        (3, C), of all processes' values
    batch_norm_gradient_sums(grad_output, …, stats) -> sums    (2, C): Σ g and Σ g·x̂ of its values
    batch_norm_gradient(grad_output, …, stats, means) -> gradients of input and residual

where g = grad_output · act'(z) and means is (2, C): Σ g / m and Σ g·x̂ / (m - correction) of all.
A graph sees one operator forward and one backward, so nothing about processes is traced.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import distributed, reference
from . import activation
from . import batch_norm as ops
from ._library import LIBRARY, EagerFunction, define, vjp
from .batch_norm_autograd import differentiate, remember
from .bits import unpack_bits


class SingleValueError(ValueError):
    """All processes together have one value per channel, or no more than `correction`."""


# --- this process's share


def _statistics_fallback(input: Tensor, mask: Tensor | None) -> Tensor:
    if input.numel() == 0:
        stats = _statistics_fake(input, mask).zero_()
        stats[1] = 1
        return stats
    return ops.batch_statistics(input, mask)


def _statistics_fake(input: Tensor, mask: Tensor | None) -> Tensor:
    return ops.stats_like(input)


statistics = define(
    "channel_statistics(Tensor input, Tensor? mask) -> Tensor",
    fallback=_statistics_fallback,
    fake=_statistics_fake,
    gpu="sync_batch_norm.statistics",
)


def _merge_fake(messages: Tensor) -> Tensor:
    return messages.new_empty((3, messages.shape[1] // 2 - 1))


merge = define(
    "merge_statistics(Tensor messages) -> Tensor",
    fallback=distributed.merge_messages,
    fake=_merge_fake,
)


def normalizing_variance(stats: Tensor, correction: int) -> Tensor:
    """The variance that x is divided by, (C,): var · m / (m - correction)."""
    if correction == 0:
        return stats[1]
    m = stats[2]
    return stats[1] * (m / (m - correction).clamp(min=1))


def _pieces(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
    act_param: float,
) -> tuple[Tensor, ...]:
    """The gradients of input, residual, weight and bias as if mean and var were constants."""
    if bits is not None:  # then act'(z) is a constant, and only the affine part is left
        passes = unpack_bits(bits, torch.empty_like(input))
        grad_output = torch.where(passes, grad_output, grad_output * act_param)
        act = 0
    return reference.batch_norm_backward(
        grad_output, input, mean, var, weight, bias, eps, residual=residual, mask=mask,
        **activation.decode(act, act_param),
    )  # fmt: skip


def _through_statistics(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    means: Tensor,
) -> Tensor:
    """The gradient of `_pieces`, less weight · rstd · (means[0] + x̂ · means[1])."""
    shape = (1, -1, *(1,) * (input.dim() - 2))
    rstd = 1 / torch.sqrt(var + eps)
    scale = rstd if weight is None else rstd * reference.widen(weight)
    normalized = (reference.widen(input) - mean.view(shape)) * rstd.view(shape)
    inner = means[0].view(shape) + normalized * means[1].view(shape)
    return gradient - reference.hide(inner, mask) * scale.view(shape)


def _sums_fallback(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> Tensor:
    if input.numel() == 0:
        return ops.stats_like(input)[:2].zero_()
    _, _, products, sums = _pieces(
        grad_output, input, weight, bias, residual, mask, bits, stats[0],
        normalizing_variance(stats, correction), eps, act, act_param,
    )  # fmt: skip
    return torch.stack((sums, products))


def _sums_fake(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return ops.stats_like(input)[:2].clone()


gradient_sums = define(
    "batch_norm_gradient_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor? bits, Tensor stats, float eps, int correction, "
    "int act, float act_param) -> Tensor",
    fallback=_sums_fallback,
    fake=_sums_fake,
    gpu="sync_batch_norm.gradient_sums",
)


def _gradient_fallback(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    means: Tensor,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> tuple[Tensor, Tensor]:
    result = _gradient_fake(
        grad_output, input, weight, bias, residual, mask, bits, stats, means, eps, correction, act,
        act_param, need,
    )  # fmt: skip
    if input.numel() == 0:
        return result
    mean, var = stats[0], normalizing_variance(stats, correction)
    grad_input, grad_residual, _, _ = _pieces(
        grad_output, input, weight, bias, residual, mask, bits, mean, var, eps, act, act_param
    )
    if need & ops.NEED_INPUT:
        hidden = reference.hide(input, mask)
        result[0].copy_(
            _through_statistics(grad_input, hidden, weight, mask, mean, var, eps, means)
        )
    if need & ops.NEED_RESIDUAL:
        result[1].copy_(grad_residual)
    return result


def _gradient_fake(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    need = args[-1]
    nothing = input.new_empty(0)
    return (
        torch.empty_like(input) if need & ops.NEED_INPUT else nothing,
        torch.empty_like(input) if need & ops.NEED_RESIDUAL else nothing.clone(),
    )


gradient = define(
    "batch_norm_gradient(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor? bits, Tensor stats, Tensor means, float eps, "
    "int correction, int act, float act_param, int need) "
    "-> (Tensor grad_input, Tensor grad_residual)",
    fallback=_gradient_fallback,
    fake=_gradient_fake,
    gpu="sync_batch_norm.gradient",
)


# --- all processes together


@functools.lru_cache(1024)
def _words(
    phase: str,
    channels: int,
    dtype: torch.dtype,
    has_weight: bool,
    has_bias: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> str:
    """What must be the same in every process. A residual and a mask are its own affair."""
    parameters = [name for name, has in (("weight", has_weight), ("bias", has_bias)) if has]
    return (
        f"{phase} of {channels} channels, {dtype}, {' and '.join(parameters) or 'no parameters'}, "
        f"eps={eps}, correction={correction}, act={activation.NAMES[act]!r}, act_param={act_param}"
    )


def _site(
    group: str,
    layer: str,
    phase: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *config: Any,
) -> distributed.Site:
    words = _words(
        phase, input.shape[1], input.dtype, weight is not None, bias is not None, *config
    )
    return distributed.Site(group, layer, words)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_bits: bool,
    group: str,
    layer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    site = _site(group, layer, "forward", input, weight, bias, eps, correction, act, act_param)
    stats = merge(distributed.gather(statistics(input, mask), site))
    _check_count(stats, input, correction, site)
    output, _, bits = ops.forward(
        input, weight, bias, residual, mask, stats[0], normalizing_variance(stats, correction), eps,
        0, act, act_param, save_bits,
    )  # fmt: skip
    return output, stats, bits


def _check_count(stats: Tensor, input: Tensor, correction: int, site: distributed.Site) -> None:
    # Elsewhere the question would wait for the device. Calls that differ give NaN there, which
    # reaches every output and the loss, and no buffer; one value comes out as the bias.
    if not stats.is_cpu or stats.numel() == 0:
        return
    count = stats[2, 0].item()
    if math.isnan(count):
        distributed.raise_disagreement(site, stats.device)
    if 0 < count <= max(1, correction):
        raise SingleValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{input.size()} in this process and {count:.0f} per channel in all processes of the "
            f"group together: {site.layer} divides by their variance. Use larger batches, "
            "drop_last=True in the DataLoader, .eval(), or on_single_value='running' with running "
            "statistics."
        )


def _forward_fake(
    input: Tensor,
    weight: Any,
    bias: Any,
    residual: Any,
    mask: Any,
    eps: Any,
    correction: Any,
    act: Any,
    act_param: Any,
    save_bits: bool,
    group: Any,
    layer: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.forward_fake(
        input, weight, bias, residual, mask, None, None, eps, correction, act, act_param, save_bits
    )


forward = define(
    "sync_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "float eps, int correction, int act, float act_param, bool save_bits, str group, str layer) "
    "-> (Tensor output, Tensor stats, Tensor bits)",
    fallback=_forward,
    fake=_forward_fake,
)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    group: str,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    layer: str,
    need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = (grad_output, input, weight, bias, residual, mask, bits, stats)
    config = (eps, correction, act, act_param)
    sums = gradient_sums(*operands, *config)
    means = sums
    if need & ops.NEED_INPUT:
        site = _site(group, layer, "backward", input, weight, bias, *config)
        means = _means(distributed.sum_processes(sums, site), stats, correction)
    grad_input, grad_residual = gradient(*operands, means, *config, need)

    def of_parameter(parameter: Tensor | None, own: Tensor) -> Tensor:
        if parameter is None or not need & ops.NEED_PARAMETERS:
            return input.new_empty(0)
        return own.to(parameter.dtype, copy=True)

    return grad_input, grad_residual, of_parameter(weight, sums[1]), of_parameter(bias, sums[0])


def _means(sums: Tensor, stats: Tensor, correction: int) -> Tensor:
    """Σ g / m and Σ g·x̂ / (m - correction) of all processes, (2, C)."""
    m = stats[2]
    return sums / torch.stack((m, m - correction)).clamp(min=1)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_one = (*args[:8], True, *args[9:13], args[14])  # what one process's backward takes
    return ops.backward_fake(*of_one)


backward = define(
    "sync_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? mask, Tensor? bits, Tensor stats, str group, float eps, "
    "int correction, int act, float act_param, str layer, int need) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    fallback=_backward,
    fake=_backward_fake,
)


# --- derivatives


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, bits = output
    ctx.mark_non_differentiable(stats, bits)
    group, layer = inputs[10:]
    remember(ctx, inputs[:5], stats, bits, (group, *inputs[5:9], layer))


def _autograd_backward(
    ctx: Any, grad_output: Tensor, _stats: Tensor, _bits: Tensor
) -> tuple[Tensor | None, ...]:
    return (*differentiate(ctx, ctx.saved_tensors, grad_output, backward), *(None,) * 8)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.config = inputs[8:14]


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *primals, mask, bits, stats = ctx.saved_tensors
    group, eps, correction, act, act_param, layer = ctx.config
    site = _site(
        group, layer, "double backward", primals[1], *primals[2:4], eps, correction, act, act_param
    )

    def formula(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # The statistics once more, as functions of every process's input: their part of the
        # gradient is what saved ones would lose.
        x = reference.hide(reference.widen(input), mask)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        m = stats[2].clamp(min=1)
        near = stats[0]
        apart = reference.hide(x - near.view(shape), mask)
        mean = near + distributed.total(apart.sum(dims), site) / m
        apart = reference.hide(x - mean.view(shape), mask)
        var = distributed.total(apart.square().sum(dims), site)
        var = var / (m - correction).clamp(min=1)
        constants = (mask, bits, mean, var, eps, act, act_param)
        gradient, *others, products, sums = _pieces(
            grad_output, input, weight, bias, residual, *constants
        )
        total = distributed.total(torch.stack((sums, products)), site)
        means = _means(total, stats, correction)
        gradient = _through_statistics(gradient, x, weight, mask, mean, var, eps, means)
        return gradient, *others, products, sums

    gradients, pull = vjp(formula, primals)
    # What was not asked for came back empty: its cotangent is zero.
    cotangents = tuple(
        c.to(g.dtype) if c is not None and c.shape == g.shape else torch.zeros_like(g)
        for c, g in zip(grads, gradients, strict=True)
    )
    return (*pull(cotangents), *(None,) * 10)


torch.library.register_autograd(
    "normally::sync_batch_norm",
    _autograd_backward,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    lib=LIBRARY,
)
torch.library.register_autograd(
    "normally::sync_batch_norm_backward",
    _double_backward,
    setup_context=lambda ctx, inputs, output: _save_backward(ctx, inputs, output),
    lib=LIBRARY,
)


class EagerSyncBatchNorm(EagerFunction):
    """The same derivative for plain eager autograd, as `EagerBatchNorm` is batch norm's."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        config: tuple[float, int, int, float],
        save_bits: bool,
        group: str,
        layer: str,
    ) -> tuple[Tensor, Tensor]:
        """The output and the statistics."""
        tensors = (input, weight, bias, residual, mask)
        with torch._C._AutoDispatchBelowAutograd():
            output, stats, bits = _forward(*tensors, *config, save_bits, group, layer)
        ctx.mark_non_differentiable(stats)
        remember(ctx, tensors, stats, bits, (group, *config, layer))
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _stats: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable itself where the caller asked for a graph."""
        saved = ctx.saved_tensors  # unpacking may run a checkpointed forward, with autograd
        if torch.is_grad_enabled():
            gradients = differentiate(ctx, saved, grad_output, backward)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = differentiate(ctx, saved, grad_output, _backward)
        return (*gradients, *(None,) * 5)

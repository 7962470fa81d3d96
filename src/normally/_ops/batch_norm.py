"""`normally::batch_norm` and its backward: schemas, shapes, autograd, vmap, fallback.

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

#: Rows of at most this many elements per channel are walked across channels: kernels.h agrees.
MAX_SHORT_ROW = 8

# What the backward must compute, as bits of `need`.
NEED_INPUT, NEED_PARAMETERS, NEED_RESIDUAL = 1, 2, 4


def mask_shape(output: Tensor) -> tuple[int, int]:
    """(rows, bytes a row) of the mask of a dense `output`, following its order in memory.

    A dense tensor is (outer, C, inner) in memory, `inner` being the stride of the channel.
    """
    channels = output.shape[1]
    inner = output.stride(1) if channels > 1 else output.numel()
    row = channels * inner if inner <= MAX_SHORT_ROW else inner
    return (output.numel() // row if row else 0), (row + 7) // 8


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as a bool tensor of the shape and strides of `like`, which is dense."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    rows, _ = mask.shape
    row = like.numel() // rows if rows else 0
    flat = bits.flatten(1)[:, :row].flatten().to(torch.bool)
    return flat.as_strided(like.shape, like.stride()) if like.numel() else flat.view(like.shape)


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
    result = forward(
        input, weight, bias, residual, None, None, eps, correction, act, act_param, save_mask
    )
    count = input.numel() // max(1, input.shape[1])
    running_stats.update(
        running_mean, running_var, num_batches_tracked, skipped_updates, result[1], count,
        momentum, unbiased,
    )  # fmt: skip
    return result


def _forward_and_update_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_fake(input, *args[:3], None, None, *args[9:])


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


# --- autograd -------------------------------------------------------------------------------


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


def _differentiate(
    ctx: Any, grad_output: Tensor, call: Callable[..., tuple[Tensor, ...]]
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
    grad_input, grad_residual, grad_weight, grad_bias = call(
        grad_output, *ctx.saved_tensors, *config, need
    )
    if ctx.has_residual and not act:
        grad_residual = grad_output
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
        grad_residual if needs[3] else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, mask = output
    ctx.mark_non_differentiable(stats, mask)
    _remember(ctx, inputs[:4], stats, mask, (inputs[4] is None, *inputs[6:10]))


def _autograd_backward(
    ctx: Any, grad_output: Tensor, _stats: Tensor, _mask: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_differentiate(ctx, grad_output, backward), *(None,) * 7)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.config = inputs[7:12]


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *primals, mask, stats = ctx.saved_tensors
    if primals[1].numel() == 0:
        return (*(None if t is None else torch.zeros_like(t) for t in primals), *(None,) * 8)
    formula = _formula(mask, stats, *ctx.config)
    present = [t for t in primals if t is not None]

    def of_present(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return formula(*(next(given) if t is not None else None for t in primals))

    gradients, vjp = torch.func.vjp(of_present, *present)
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
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output),
    lib=LIBRARY,
)
torch.library.register_autograd(
    "normally::batch_norm_backward",
    _double_backward,
    setup_context=lambda ctx, inputs, output: _save_backward(ctx, inputs, output),
    lib=LIBRARY,
)


class EagerBatchNorm(torch.autograd.Function):
    """The same derivative without the dispatcher's Python round trips, for plain eager autograd.

    The operator's own registration costs 15 µs a step more, which is what a small tensor costs.
    """

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        """Without the base class's look for functorch, which the caller has done: 3 µs."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(  # type: ignore[override]
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Differentiable itself where the caller asked for a graph."""
        if torch.is_grad_enabled():
            gradients = _differentiate(ctx, grad_output, backward)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = _differentiate(ctx, grad_output, backward)
        return (*gradients, None, None, None)


# --- vmap: a mapped dimension folds into the channels, which are normalized one by one ---------


def _fold(
    tensor: Tensor | None, dim: int | None, size: int, channel_dim: int
) -> Tensor | None:
    """Move the mapped dimension (or a new one) in front of the channels and merge the two."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(size, *tensor.shape)
        dim = 0
    return tensor.movedim(dim, channel_dim).flatten(channel_dim, channel_dim + 1)


def _unfold(tensor: Tensor, size: int, channel_dim: int) -> Tensor:
    return tensor.unflatten(channel_dim, (size, tensor.shape[channel_dim] // size))


def _map_forward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    size = info.batch_size
    folded = [
        _fold(tensor, dim, size, channel_dim)
        for tensor, dim, channel_dim in zip(args[:6], in_dims, (1, 0, 0, 1, 0, 0), strict=False)
    ]
    output, stats, mask = call(*folded, *args[6:10], False)
    return (_unfold(output, size, 1), _unfold(stats, size, 1), mask), (1, 1, None)


def _map_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    size = info.batch_size
    if args[5] is not None:
        raise RuntimeError("normally::batch_norm_backward: a saved mask cannot be mapped over.")
    folded = [
        _fold(tensor, dim, size, channel_dim)
        for tensor, dim, channel_dim in zip(args[:7], in_dims, (1, 1, 0, 0, 1, 0, 1), strict=False)
    ]
    results = call(*folded, *args[7:])
    need = args[12]
    asked = (
        need & NEED_INPUT,
        need & NEED_RESIDUAL,
        need & NEED_PARAMETERS and args[2] is not None,
        need & NEED_PARAMETERS and args[3] is not None,
    )
    dims = tuple(d if a else None for d, a in zip((1, 1, 0, 0), asked, strict=True))
    outputs = tuple(
        t if d is None else _unfold(t, size, d) for t, d in zip(results, dims, strict=True)
    )
    return outputs, dims


torch.library.register_vmap(
    "normally::batch_norm",
    lambda info, in_dims, *args: _map_forward(forward, info, in_dims, args),
    lib=LIBRARY,
)
torch.library.register_vmap(
    "normally::batch_norm_backward",
    lambda info, in_dims, *args: _map_backward(backward, info, in_dims, args),
    lib=LIBRARY,
)


class TransformableBatchNorm(torch.autograd.Function):
    """The derivative in the form that `torch.func` transforms can take apart and nest."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The operator itself."""
        return forward(*inputs)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Through a function that has a derivative under transforms, too."""
        call = _TransformableBackward.apply
        return (*_differentiate(ctx, grad_output, call), *(None,) * 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """Fold and call again, one level down."""
        return _map_forward(TransformableBatchNorm.apply, info, in_dims, args)


class _TransformableBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backward(*inputs)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save_backward)  # type: ignore[assignment]
    backward = staticmethod(_double_backward)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:  # type: ignore[override]
        return _map_backward(_TransformableBackward.apply, info, in_dims, args)

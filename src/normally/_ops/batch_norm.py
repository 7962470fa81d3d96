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
from . import activation
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
        dims = [d for d in range(input.dim()) if d != 1]
        mean, var = reference.moments(reference.widen(input), dims)
    stats = torch.stack((mean.flatten(), var.flatten())).to(_stats_dtype(input))
    return output, stats, no_mask


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


def _differentiable_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor | None,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> Tensor:
    """The output as a plain torch expression of its tensors; `stats` only in evaluation mode."""
    mean, var = (None, None) if stats is None else stats.unbind()
    return reference.batch_norm(
        input, mean, var, weight, bias, eps,
        residual=residual, correction=correction, **activation.decode(act, act_param),
    )  # fmt: skip


def _differentiable_backward(
    primals: tuple[Tensor | None, ...],
    mask: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The backward as a function of the tensors that are there, and those tensors.

    The function takes grad_output and then each of input, weight, bias and residual that is not
    None, and returns the gradients of the latter. The batch's statistics are recomputed from the
    input, so its own derivative has the terms that saved statistics would lose.
    """
    present = [t for t in primals if t is not None]
    masked = None if mask is None else unpack_mask(mask, primals[1])  # type: ignore[arg-type]

    def backward(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        if masked is not None:  # then act'(z) is a constant, and only the affine part is left
            grad_output = torch.where(masked, grad_output, grad_output * act_param)

        def forward_of(*tensors: Tensor) -> Tensor:
            given = iter(tensors)
            args = (next(given) if t is not None else None for t in primals[1:])
            input, weight, bias, residual = args
            return _differentiable_forward(
                input,  # type: ignore[arg-type]  # the input is always there
                weight,
                bias,
                residual,
                None if training else stats,
                eps,
                correction,
                0 if masked is not None else act,
                act_param,
            )

        _, vjp = torch.func.vjp(forward_of, *tensors)
        gradients: tuple[Tensor, ...] = vjp(grad_output)
        if masked is not None:
            gradients = (*gradients, grad_output)
        return gradients

    return backward, present


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
    primals = (grad_output, input, weight, bias, residual)
    function, present = _differentiable_backward(
        primals, mask, stats, training, eps, correction, act, act_param
    )
    gradients = iter(function(*present))
    computed = [next(gradients) if t is not None else None for t in primals[1:]]
    if mask is not None:
        computed[3] = next(gradients)
    for target, gradient in zip(
        result, (computed[0], computed[3], computed[1], computed[2]), strict=True
    ):
        if gradient is not None and target.shape == gradient.shape:
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, residual, mean, var, eps, correction, act, act_param, _ = inputs
    _, stats, mask = output
    has_mask = mask.numel() > 0
    # Without an activation the residual's gradient is grad_output itself.
    kept = residual if act and not has_mask else None
    ctx.mark_non_differentiable(stats, mask)
    ctx.save_for_backward(
        input, weight, bias if act else None, kept, mask if has_mask else None, stats
    )
    ctx.has_bias = bias is not None
    ctx.has_residual = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.config = (mean is None, eps, correction, act, act_param)


def _differentiate(
    ctx: Any, grad_output: Tensor, call: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    input, weight, bias, residual, mask, stats = ctx.saved_tensors
    act = ctx.config[3]
    needs = ctx.needs_input_grad
    if bias is None and ctx.has_bias:
        # Its values do not matter without an activation, but its gradient has its dtype.
        bias = stats.new_zeros(stats.shape[1], dtype=ctx.bias_dtype)
    fused_residual = ctx.has_residual and act
    need = (
        (NEED_INPUT if needs[0] else 0)
        | (NEED_PARAMETERS if needs[1] or needs[2] else 0)
        | (NEED_RESIDUAL if fused_residual and needs[3] else 0)
    )
    grad_input, grad_residual, grad_weight, grad_bias = call(
        grad_output, input, weight, bias, residual, mask, stats, *ctx.config, need
    )
    if ctx.has_residual and not act:
        grad_residual = grad_output
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
        grad_residual if needs[3] else None,
    )


def _autograd_backward(
    ctx: Any, grad_output: Tensor, _stats: Tensor, _mask: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_differentiate(ctx, grad_output, backward), *(None,) * 7)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.config = inputs[7:12]


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *primals, mask, stats = ctx.saved_tensors
    function, present = _differentiable_backward(tuple(primals), mask, stats, *ctx.config)
    grad_input, grad_residual, grad_weight, grad_bias = grads
    gradients, vjp = torch.func.vjp(function, *present)
    cotangents = [
        given
        for given, primal in zip((grad_input, grad_weight, grad_bias), primals[1:4], strict=True)
        if primal is not None
    ]
    if len(cotangents) < len(gradients):
        cotangents.append(grad_residual)
    # An output that was not asked for came back empty: its cotangent is zero.
    filled = tuple(
        torch.zeros_like(g) if c is None or c.shape != g.shape else c
        for c, g in zip(cotangents, gradients, strict=True)
    )
    second = iter(vjp(filled))
    result = tuple(next(second) if primal is not None else None for primal in primals)
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
    """The same derivative without the dispatcher's Python round trips.

    Measured on (2, 16, 8, 8): 15 µs less a step. Only for plain eager autograd: under a compiler or
    a functorch transform the operator's own registration applies.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The operator below autograd; returns the output and the statistics."""
        with torch._C._AutoDispatchBelowAutograd():
            result = forward(*inputs)
        _save(ctx, inputs, result)
        return result[0], result[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _stats: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Differentiable itself where the caller asked for a graph."""
        if torch.is_grad_enabled():
            return _autograd_backward(ctx, grad_output, _stats, _stats)
        with torch._C._AutoDispatchBelowAutograd():
            return _autograd_backward(ctx, grad_output, _stats, _stats)


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
    return tensor.unflatten(channel_dim, (size, -1)) if tensor.numel() else tensor


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
    channel_dims = (1, 1, 0, 0)
    outputs = tuple(_unfold(t, size, d) for t, d in zip(results, channel_dims, strict=True))
    dims = tuple(d if t.numel() else None for t, d in zip(results, channel_dims, strict=True))
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

"""Batch norm under `torch.func`: vmap, and derivatives that transforms can take apart and nest.

A mapped dimension folds into the channels, which are normalized one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batch_norm as ops
from . import batch_norm_autograd
from ._library import LIBRARY, map_elements


def _fold(tensor: Tensor | None, dim: int | None, size: int, channel_dim: int) -> Tensor | None:
    """Move the mapped dimension (or a new one) in front of the channels and merge the two."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(size, *tensor.shape)
        dim = 0
    return tensor.movedim(dim, channel_dim).flatten(channel_dim, channel_dim + 1)


def _unfold(tensor: Tensor, size: int, channel_dim: int) -> Tensor:
    sizes = (size, tensor.shape[channel_dim] // size)
    unfolded: Tensor = tensor.unflatten(channel_dim, sizes)
    return unfolded


def _map_forward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    if in_dims[4] is not None:  # a mask of its own for every element
        return map_elements(call)(info, in_dims, *args)
    size = info.batch_size
    input, weight, bias, residual, mean, var = (
        _fold(args[i], in_dims[i], size, channel_dim)
        for i, channel_dim in ((0, 1), (1, 0), (2, 0), (3, 1), (5, 0), (6, 0))
    )
    output, stats, bits = call(
        input, weight, bias, residual, args[4], mean, var, *args[7:11], False
    )
    return (_unfold(output, size, 1), _unfold(stats, size, 1), bits), (1, 1, None)


def _map_backward(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    if args[6] is not None:
        raise RuntimeError("normally::batch_norm_backward: saved bits cannot be mapped over.")
    if in_dims[5] is not None:
        return map_elements(call)(info, in_dims, *args)
    size = info.batch_size
    grad_output, input, weight, bias, residual, stats = (
        _fold(args[i], in_dims[i], size, channel_dim)
        for i, channel_dim in ((0, 1), (1, 1), (2, 0), (3, 0), (4, 1), (7, 1))
    )
    results = call(grad_output, input, weight, bias, residual, args[5], None, stats, *args[8:])
    need = args[13]
    asked = (
        need & ops.NEED_INPUT,
        need & ops.NEED_RESIDUAL,
        need & ops.NEED_PARAMETERS and args[2] is not None,
        need & ops.NEED_PARAMETERS and args[3] is not None,
    )
    dims = tuple(d if a else None for d, a in zip((1, 1, 0, 0), asked, strict=True))
    outputs = tuple(
        t if d is None else _unfold(t, size, d) for t, d in zip(results, dims, strict=True)
    )
    return outputs, dims


torch.library.register_vmap(
    "normally::batch_norm",
    lambda info, in_dims, *args: _map_forward(ops.forward, info, in_dims, args),
    lib=LIBRARY,
)
torch.library.register_vmap(
    "normally::batch_norm_backward",
    lambda info, in_dims, *args: _map_backward(ops.backward, info, in_dims, args),
    lib=LIBRARY,
)


class TransformableBatchNorm(torch.autograd.Function):
    """The derivative in the form that `torch.func` transforms can take apart and nest."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """The operator itself."""
        return ops.forward(*inputs)

    setup_context = staticmethod(batch_norm_autograd.save)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Through a function that has a derivative under transforms, too."""
        call = _TransformableBackward.apply
        return (
            *batch_norm_autograd.differentiate(ctx, ctx.saved_tensors, grad_output, call),
            *(None,) * 8,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold and call again, one level down."""
        return _map_forward(TransformableBatchNorm.apply, info, in_dims, args)


class _TransformableBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return ops.backward(*inputs)

    setup_context = staticmethod(batch_norm_autograd.save_backward)
    backward = staticmethod(batch_norm_autograd.double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _map_backward(_TransformableBackward.apply, info, in_dims, args)

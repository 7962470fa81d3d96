"""Stateless normalization functions: validate, then call the operator.

Signatures are torch.nn.functional's; what is ours comes last and by keyword only.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from . import _native, reference
from ._ops import activation, running_stats
from ._ops import batch_norm as _batch_norm

__all__ = ["batch_norm"]


class _ArgumentError(ValueError, RuntimeError):
    """A wrong argument where torch raises RuntimeError: code that catches either keeps working."""


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    channel_dim: int = 1,
    unbiased: bool = True,
    correction: int = 0,
    on_single_value: str = "error",
    group: object | None = None,
    memory_efficient: bool = False,
    num_batches_tracked: Tensor | None = None,
    skipped_updates: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167), Algorithm 1.

        y = act(weight * (x - mean) / √(var + eps) + bias + residual)

    In training `mean` and `var` are those of the batch, a channel's values being all of N and all
    positions; in evaluation they are `running_mean` and `running_var`. Training then updates

        running = (1 - momentum) * running + momentum * batch

    with the *unbiased* variance m/(m-1)·var by default, while the biased one normalizes.

    Statistics are float64 sums of shifted float32 chunks: the output's error does not grow with
    |mean|/std, and a constant channel becomes exactly `bias`. Results have the same bits for any
    number of threads. A channel with a non-finite value leaves its running statistics as they were
    and is counted in `skipped_updates`; the other channels are untouched by it. An empty batch and
    the second forward of an activation checkpoint update nothing.

    Args:
        input: `(N, C, *)`; float64, float32, bfloat16 or float16, any strides.
        running_mean: `(C,)`, in units of x; updated in place in training.
        running_var: `(C,)`, in units of x²; updated in place in training.
        weight: γ, `(C,)`, of the input's dtype, or float32 for a half input. None is 1.
        bias: β, `(C,)`, likewise. None is 0.
        training: normalize with the batch's statistics and update the running ones.
        momentum: the weight of the *new* value (Keras and Flax state the old one's); None keeps
            the plain average over all batches, which needs `num_batches_tracked`.
        eps: added to the variance, in units of x². Positive in training.
        act: an activation fused into the same pass: "relu", "relu6", "leaky_relu", "elu", "silu",
            "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid" or "tanh".
        act_param: the slope of "leaky_relu" below 0 (0.01) or alpha of "elu" (1.0).
        residual: added before the activation; broadcastable to the input.
        mask: not implemented yet.
        lengths: not implemented yet.
        channel_dim: the dimension of C; -1 for `(N, L, C)`.
        unbiased: store the unbiased variance in `running_var` (torch) or the biased (Keras, Flax).
        correction: what the normalizing variance is divided by is m - correction; 1 is tiny-dnn's.
        on_single_value: with one value per channel in training, raise ("error") or normalize with
            the running statistics and update nothing ("running").
        group: not implemented yet.
        memory_efficient: not implemented yet.
        num_batches_tracked: a counter, incremented in place by a training batch.
        skipped_updates: `(C,)` int64, incremented where a channel's update was refused.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes, sizes or eps that make no sense, and for one value per channel.
        TypeError: for dtypes that do not go together.

    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> batch_norm(x, mean, var, training=True)
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    >>> mean, var  # 0.1 of the batch's mean (2, 20) and 0.1 of its unbiased variance (2, 200)
    (tensor([0.2000, 2.0000]), tensor([ 1.1000, 20.9000]))
    >>> batch_norm(x, mean, var, act="relu")
    tensor([[0.7628, 1.7499],
            [2.6697, 6.1247]])
    """
    for name, value in (("mask", mask), ("lengths", lengths), ("group", group)):
        if value is not None:
            _not_implemented(name)
    if memory_efficient:
        _not_implemented("memory_efficient")
    if act is None and act_param is None:
        act_code, param = 0, 0.0
    else:
        act_code, param = activation.encode(act, act_param, "batch_norm")

    moved = channel_dim != 1 and input.dim() > 1 and channel_dim % input.dim() != 1
    if moved:
        x = input.movedim(channel_dim, 1)
        residual = None if residual is None else residual.expand_as(input).movedim(channel_dim, 1)
    else:
        x = input
    count = _check(x, running_mean, running_var, weight, bias, training, eps)
    if training and count <= max(1, correction) and count > 0:
        if on_single_value == "running" and running_mean is not None and running_var is not None:
            training = False
        else:
            _refuse_single_value(input, count, correction, on_single_value)
    if training and momentum is None and num_batches_tracked is None and running_mean is not None:
        raise ValueError(
            "batch_norm: num_batches_tracked must be given when momentum is None: the cumulative "
            "average divides by the number of batches. Got momentum=None, num_batches_tracked=None."
        )

    unfused = None
    if residual is not None and residual.dtype != x.dtype:
        # The sum has the promoted dtype, as in torch; only then the activation.
        unfused, residual, act_code = residual, None, 0
    elif residual is not None and residual.shape != x.shape:
        residual = _expand_residual(residual, x)

    mean, var = (None, None) if training else (running_mean, running_var)
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        # Operators have no forward-mode formula; the plain expression does.
        output = reference.batch_norm(
            x, mean, var, weight, bias, eps,
            residual=residual, correction=correction, **activation.decode(act_code, param),
        )  # fmt: skip
        stats = None
    else:
        output, stats = _call(
            x, weight, bias, residual, mean, var, eps, correction, act_code, param
        )
    if training and (running_mean is not None or running_var is not None):
        if stats is None:
            dims = [d for d in range(x.dim()) if d != 1]
            stats = torch.stack(reference.moments(reference.widen(x.detach()), dims)).flatten(1)
        if not _is_recomputation():
            running_stats.update(
                running_mean, running_var, num_batches_tracked, skipped_updates, stats, count,
                momentum, unbiased,
            )  # fmt: skip
    if moved:
        output = output.movedim(1, channel_dim)
    if unfused is not None:
        output = reference.activate(output + unfused, act, act_param)
    return output


def _call(*args: object) -> tuple[Tensor, Tensor]:
    """The operator, with autograd by the shortest route that is right here."""
    tensors: tuple[Tensor | None, ...] = args[:4]  # type: ignore[assignment]
    differentiate = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    input, residual, act = tensors[0], tensors[3], args[8]
    save_mask = (
        differentiate
        and residual is not None
        and act in activation.PIECEWISE_CONSTANT
        and _native.loaded is not None
        and input is not None
        and input.device.type == "cpu"
    )
    if torch.compiler.is_compiling():
        output, stats, _ = _batch_norm.forward(*args, save_mask)
    elif torch._C._are_functorch_transforms_active():
        output, stats, _ = _batch_norm.TransformableBatchNorm.apply(*args, False)
    elif differentiate:
        output, stats = _batch_norm.EagerBatchNorm.apply(*args, save_mask)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output, stats, _ = _batch_norm.forward(*args, save_mask)
    return output, stats


def _is_recomputation() -> bool:
    """Whether this forward runs inside a backward: an activation checkpoint's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> int:
    """Refuse what makes no sense before anything is changed; return the values per channel."""
    if x.dim() < 2:
        raise ValueError(
            f"batch_norm: input must have at least 2 dimensions (N, C, *). Got {x.dim()}D input."
        )
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(
            f"batch_norm: input must be floating point. Got input.dtype={dtype}; "
            "convert it first, for example input.float()."
        )
    if not training:
        for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
            if buffer is None:
                raise _ArgumentError(
                    f"batch_norm: {name} must be defined in evaluation mode. Got {name}=None; "
                    "pass training=True to normalize with the batch's own statistics."
                )
    if eps <= 0 and training:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    channels = x.shape[1]
    for index, tensor in enumerate((running_mean, running_var, weight, bias)):
        if tensor is not None and (
            tensor.dim() != 1
            or tensor.shape[0] != channels
            or tensor.device != x.device
            or (tensor.dtype != dtype and not (_is_half(dtype) and tensor.dtype is torch.float32))
        ):
            _refuse_parameter(("running_mean", "running_var", "weight", "bias")[index], tensor, x)
    return math.prod(x.shape) // channels if channels else x.shape[0] * math.prod(x.shape[2:])


def _is_half(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 or dtype is torch.float16


def _refuse_parameter(name: str, tensor: Tensor, x: Tensor) -> None:
    channels = x.shape[1]
    if tensor.dim() != 1 or tensor.shape[0] != channels:
        raise _ArgumentError(
            f"batch_norm: {name} should contain {channels} elements not {tensor.numel()}: one a "
            f"channel of the input. Got input of shape {tuple(x.shape)}, "
            f"{name} of shape {tuple(tensor.shape)}."
        )
    if tensor.device != x.device:
        raise _ArgumentError(
            f"batch_norm: Expected all tensors to be on the same device. Got input on {x.device}, "
            f"{name} on {tensor.device}; move the module or the input with .to(device)."
        )
    if name.startswith("running") and tensor.dtype.is_floating_point:
        return  # buffers may be kept in any floating dtype
    allowed = f"{x.dtype} or torch.float32" if _is_half(x.dtype) else f"{x.dtype}"
    raise TypeError(
        f"batch_norm: {name} must be {allowed} for an input of {x.dtype}. "
        f"Got {name}.dtype={tensor.dtype}; convert the module or the input with .to(dtype)."
    )


def _refuse_single_value(
    input: Tensor, count: int, correction: int, on_single_value: str
) -> NoReturn:
    if on_single_value not in ("error", "running"):
        raise ValueError(
            "batch_norm: on_single_value must be 'error' or 'running'. "
            f"Got on_single_value={on_single_value!r}."
        )
    way_out = (
        "Use a larger batch, drop_last=True in the DataLoader, .eval(), or "
        "on_single_value='running' with running statistics."
    )
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{input.size()}: its mean is the value itself, so every output would be the bias. "
            f"{way_out}"
        )
    raise ValueError(
        f"batch_norm: expected more than correction={correction} values per channel when training, "
        f"got {count} with input size {input.size()}. {way_out}"
    )


def _expand_residual(residual: Tensor, x: Tensor) -> Tensor:
    try:
        return residual.expand_as(x)
    except RuntimeError:
        raise ValueError(
            "batch_norm: residual must be broadcastable to the input's shape. "
            f"Got input of shape {tuple(x.shape)}, residual of shape {tuple(residual.shape)}."
        ) from None


def _not_implemented(name: str) -> NoReturn:
    raise NotImplementedError(
        f"batch_norm: {name} is not implemented in this version of normally; its place in the "
        f"signature is reserved. Call without {name}."
    )

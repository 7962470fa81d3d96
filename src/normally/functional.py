"""Stateless normalization functions: validate, then call the operator.

Signatures are torch.nn.functional's; what is ours comes last and by keyword only.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native, reference
from ._ops import activation, running_stats
from ._ops import batch_norm as _batch_norm

__all__ = ["batch_norm"]


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    if mask is not None or lengths is not None or group is not None or memory_efficient:
        _refuse_reserved(mask=mask, lengths=lengths, group=group, memory_efficient=memory_efficient)
    if act is None and act_param is None:
        fused = (0, 0.0)
    else:
        fused = activation.encode(act, act_param, "batch_norm")
    x = input
    moved = channel_dim != 1 and _is_other_dim(channel_dim, input)
    if moved:
        x = input.movedim(channel_dim, 1)
    added = None
    if residual is not None:
        residual = _prepare_residual(residual, input)
        if moved:
            residual = residual.movedim(channel_dim, 1)
        if residual.dtype != x.dtype:
            # The sum has the promoted dtype, as in torch; only then the activation.
            added, residual, fused = residual, None, (0, 0.0)

    call = _Call(
        x, weight, bias, residual, running_mean, running_var, num_batches_tracked, skipped_updates,
        training, momentum, unbiased, eps, correction, on_single_value, *fused,
    )  # fmt: skip
    if _is_plain(call):
        try:
            output = _run_eagerly(call)
        except RuntimeError:
            # The kernel checked in passing and changed nothing; find the words for what it saw.
            output = _run(_checked(call))
    else:
        output = _run(_checked(call))

    if added is not None:
        output = reference.activate(output + added, act, act_param)
    return output.movedim(1, channel_dim) if moved else output


class _Call(NamedTuple):
    """One call of batch norm, the channel at dimension 1."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    skipped_updates: Tensor | None
    training: bool
    momentum: float | None
    unbiased: bool
    eps: float
    correction: int
    on_single_value: str
    act: int
    act_param: float


def _is_plain(call: _Call) -> bool:
    """Whether this is eager execution of compiled kernels and nothing else.

    Not a compiler, a tracer, a functorch transform or forward-mode AD; nor arguments so wrong that
    the kernel would not see them. Everything asked here costs less than 0.1 µs.
    """
    if (
        _native.loaded is None
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    if call.training:
        plain = call.momentum is not None or call.num_batches_tracked is not None
    else:
        plain = call.running_mean is not None and call.running_var is not None
    return (
        plain
        and (call.eps > 0 or (call.eps == 0 and not call.training))
        and call.correction >= 0
        and call.on_single_value == "error"
        and all(t is None or t.is_cpu for t in call[:8])
    )


def _differentiates(call: _Call) -> bool:
    input, weight, bias, residual = call[:4]
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _run_eagerly(call: _Call) -> Tensor:
    """One operator call, and one autograd node where a gradient is wanted."""
    differentiates = _differentiates(call)
    save_mask = (
        differentiates and call.residual is not None and call.act in activation.PIECEWISE_CONSTANT
    )
    config = (call.eps, call.correction, call.act, call.act_param)
    tensors = call[:4]
    arguments: tuple[object, ...]
    if not call.training:
        operator = _batch_norm.forward
        arguments = (call.running_mean, call.running_var, *config, save_mask)
    elif _is_recomputation():
        operator = _batch_norm.forward_and_update
        arguments = (None, None, None, None, call.momentum, call.unbiased, *config, save_mask)
    else:
        operator = _batch_norm.forward_and_update
        arguments = (*call[4:8], call.momentum, call.unbiased, *config, save_mask)
    if differentiates:
        output = _batch_norm.EagerBatchNorm.apply(
            *tensors, operator, arguments, (call.training, *config)
        )
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output, _, _ = operator(*tensors, *arguments)
    if call.training:
        running_stats.mark_changed(call.running_mean, call.running_var)
    return output  # type: ignore[no-any-return]


def _run(call: _Call) -> Tensor:
    """The general route: normalize by what fits the circumstances, then update the buffers."""
    x = call.input
    if x.dim() < 2:
        return x.clone()  # torch takes an empty vector, too
    mean, var = (None, None) if call.training else (call.running_mean, call.running_var)
    arguments = (*call[:4], mean, var, call.eps, call.correction, call.act, call.act_param, False)
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        output, stats, _ = _batch_norm.forward(*arguments)
    elif forward_ad._current_level >= 0:
        # Operators have no forward-mode formula; the plain expression does.
        output = reference.batch_norm(
            x, mean, var, call.weight, call.bias, call.eps, residual=call.residual,
            correction=call.correction, **activation.decode(call.act, call.act_param),
        )  # fmt: skip
        stats = _batch_norm.batch_statistics(x.detach()) if call.training else None
    else:
        output, stats, _ = _batch_norm.TransformableBatchNorm.apply(*arguments)
    tracks = call.running_mean is not None or call.running_var is not None
    if call.training and tracks and not _is_recomputation():
        count = math.prod(x.shape[:1] + x.shape[2:])
        running_stats.update(*call[4:8], stats, count, call.momentum, call.unbiased)
        running_stats.mark_changed(call.running_mean, call.running_var)
    return output  # type: ignore[no-any-return]


def _is_recomputation() -> bool:
    """Whether this forward runs inside a backward: an activation checkpoint's second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _checked(call: _Call) -> _Call:
    """Refuse what makes no sense before anything is changed."""
    x, training, eps = call.input, call.training, call.eps
    if call.on_single_value not in ("error", "running"):
        raise ValueError(
            "batch_norm: on_single_value must be 'error' or 'running'. "
            f"Got on_single_value={call.on_single_value!r}."
        )
    if call.correction < 0:
        raise ValueError(
            f"batch_norm: correction must be 0 or more. Got correction={call.correction}."
        )
    if x.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"batch_norm: input must be one of {names}. Got input.dtype={x.dtype}; convert it "
            "first, for example with input.float()."
        )
    if x.dim() < 2 and not (x.dim() == 1 and x.numel() == 0):
        raise ValueError(
            f"batch_norm: input must have at least 2 dimensions (N, C, *). Got {x.dim()}D input."
        )
    if not training:
        for name in ("running_mean", "running_var"):
            if getattr(call, name) is None:
                raise _ArgumentError(
                    f"batch_norm: {name} must be defined in evaluation mode. Got {name}=None; "
                    "pass training=True to normalize with the batch's own statistics."
                )
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if x.dim() < 2:
        return call
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(call, name)
        if tensor is not None:
            _check_parameter(name, tensor, x)
    if not training:
        return call
    if call.momentum is None and call.num_batches_tracked is None and call.running_mean is not None:
        raise ValueError(
            "batch_norm: num_batches_tracked must be given when momentum is None: the cumulative "
            "average divides by the number of batches. Got momentum=None, num_batches_tracked=None."
        )
    count = math.prod(x.shape[:1] + x.shape[2:])
    if count > max(1, call.correction) or count == 0:
        return call
    if call.on_single_value == "running" and None not in (call.running_mean, call.running_var):
        return call._replace(training=False)
    return _refuse_single_value(x, count, call.correction)


def _check_parameter(name: str, tensor: Tensor, x: Tensor) -> None:
    channels = x.shape[1]
    if tensor.dim() != 1 or tensor.shape[0] != channels:
        raise _ArgumentError(
            f"batch_norm: {name} should contain {channels} elements not {tensor.numel()}: one a "
            f"channel of the input. Got input of shape {tuple(x.shape)}, "
            f"{name} of shape {tuple(tensor.shape)}."
        )
    if tensor.device != x.device:
        raise _different_devices(name, tensor, x)
    is_half = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    if tensor.dtype is x.dtype or (is_half and tensor.dtype is torch.float32):
        return
    if name.startswith("running") and tensor.dtype in _DTYPES:
        return  # buffers may be kept in any of them
    allowed = f"{x.dtype} or torch.float32" if is_half else f"{x.dtype}"
    raise TypeError(
        f"batch_norm: {name} must be {allowed} for an input of {x.dtype}. "
        f"Got {name}.dtype={tensor.dtype}; convert the module or the input with .to(dtype)."
    )


def _different_devices(name: str, tensor: Tensor, x: Tensor) -> Exception:
    return _ArgumentError(
        f"batch_norm: Expected all tensors to be on the same device. Got input on {x.device}, "
        f"{name} on {tensor.device}; move the module or the input with .to(device)."
    )


def _is_other_dim(channel_dim: int, input: Tensor) -> bool:
    """Whether `channel_dim`, which is not 1, names another dimension than 1."""
    dims = input.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"batch_norm: channel_dim must be a dimension of the input, {-dims} to {dims - 1}. "
            f"Got channel_dim={channel_dim}, input of shape {tuple(input.shape)}."
        )
    return channel_dim % dims != 1


def _prepare_residual(residual: Tensor, input: Tensor) -> Tensor:
    """The residual in the input's shape, checked."""
    if residual.dtype not in _DTYPES:
        raise TypeError(
            f"batch_norm: residual must be floating point. Got residual.dtype={residual.dtype}."
        )
    if residual.device != input.device:
        raise _different_devices("residual", residual, input)
    if residual.shape == input.shape:
        return residual
    try:
        return residual.expand_as(input)
    except RuntimeError:
        raise ValueError(
            "batch_norm: residual must be broadcastable to the input's shape. "
            f"Got input of shape {tuple(input.shape)}, residual of shape {tuple(residual.shape)}."
        ) from None


def _refuse_single_value(input: Tensor, count: int, correction: int) -> NoReturn:
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


def _refuse_reserved(**values: object) -> NoReturn:
    name = next(name for name, value in values.items() if value is not None and value is not False)
    raise NotImplementedError(
        f"batch_norm: {name} is not implemented in this version of normally; its place in the "
        f"signature is reserved. Call without {name}."
    )

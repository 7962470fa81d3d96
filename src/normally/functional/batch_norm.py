"""`batch_norm`: check, choose the route, call the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native, _triton, reference
from .._ops import activation, running_stats, sync_batch_norm
from .._ops import batch_norm as ops
from .._ops._library import record
from .._ops.batch_norm_autograd import EagerBatchNorm
from .._ops.batch_norm_transforms import TransformableBatchNorm
from ..distributed import Peers
from . import _recompute
from ._batch_norm_checks import Call, checked, is_other_dim, peers_of
from ._checks import prepare_residual
from ._masks import prepare_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    group: ProcessGroup | Peers | None = None,
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

    Statistics are sums of differences from a value near the mean, a few float32 terms at a time and
    merged in float64: the output's error does not grow with |mean|/std, and a constant channel
    becomes exactly `bias`. Results have the same bits for any
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
        mask: bool, True where a position counts: `(N, *)`, or with a size of 1 at the channel. The
            others enter no statistic, whatever they hold, and come out 0 with gradient 0.
        lengths: `(N,)` integers, the mask of a sequence: positions below the length count.
        channel_dim: the dimension of C; -1 for `(N, L, C)`.
        unbiased: store the unbiased variance in `running_var` (torch) or the biased (Keras, Flax).
        correction: what the normalizing variance is divided by is m - correction; 1 is tiny-dnn's.
        on_single_value: with one value per channel in training, raise ("error") or normalize with
            the running statistics and update nothing ("running").
        group: processes whose values are normalized together in training, each of them calling
            this function at the same place: m counts those of all, and all buffers move alike. An
            empty batch takes part. `distributed.Peers` adds the name that errors give the layer.
        memory_efficient: what saves the output for its backward (a convolution, say) keeps a recipe
            instead, once the input of another memory-efficient norm has come from it; in the
            backward the output is computed again, to the same bits. In plain eager calls with
            compiled kernels; elsewhere it changes nothing. See the guide to memory.
        num_batches_tracked: a counter, incremented in place by a training batch.
        skipped_updates: `(C,)` int64, incremented where a channel's update was refused.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes, sizes or eps that make no sense, and for one value per channel; in
            every process of a group if their calls differ.
        TypeError: for dtypes that do not go together.
        RuntimeError: if a process of the group cannot be reached within the group's timeout.

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
    peers = None if group is None else peers_of(group)
    if act is None and act_param is None:
        fused = (0, 0.0)
    else:
        fused = activation.encode(act, act_param, "batch_norm")
    x = input
    moved = channel_dim != 1 and is_other_dim(channel_dim, input)
    if moved:
        channel_dim %= input.dim()  # an ONNX exporter takes no other
        x = input.movedim(channel_dim, 1)
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, channel_dim, "batch_norm")
        if moved and mask is not None:
            mask = mask.movedim(channel_dim, 1)
    added = None
    if residual is not None:
        residual = prepare_residual(residual, input, "batch_norm")
        if moved:
            residual = residual.movedim(channel_dim, 1)
        if residual.dtype != x.dtype:
            # The sum has the promoted dtype, as in torch; only then the activation.
            added, residual, fused = reference.hide(residual, mask), None, (0, 0.0)

    call = Call(
        x, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked,
        skipped_updates, training, momentum, unbiased, eps, correction, on_single_value, *fused,
        memory_efficient,
    )  # fmt: skip
    if peers is not None and training:
        output = _run_together(checked(call, alone=False), peers)
    elif _is_plain(call):
        if call.memory_efficient or not _checks_in_passing(call):
            # A memory-efficient call may also raise behind the kernel, and is not tried again.
            output = _run_eagerly(checked(call))
        else:
            try:
                output = _run_eagerly(call)
            except RuntimeError:
                # The kernel changed nothing; find the words for what it saw.
                output = _run(checked(call))
    elif torch._C._get_tracing_state() is not None:
        output = _run(call)  # a tracer would record the checks
    else:
        output = _run(checked(call))

    if added is not None:
        output = reference.hide(reference.activate(output + added, act, act_param), mask)
    return output.movedim(1, channel_dim) if moved else output


def _is_plain(call: Call) -> bool:
    """Whether this is eager execution of compiled kernels and nothing else.

    Not a compiler, a tracer, a functorch transform or forward-mode AD; nor arguments so wrong that
    the kernel would not see them. Everything asked here costs less than 0.1 µs.
    """
    if (
        not _have_kernels(call[:9])
        or call.input.dim() < 2
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
        and call.on_single_value in ("error", "running")
    )


def _have_kernels(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether compiled kernels serve the device that all tensors are on."""
    first = tensors[0]
    assert first is not None
    if first.is_cpu:
        return (_native.loaded is not None or _triton.device_type == "cpu") and all(
            t is None or t.is_cpu for t in tensors
        )
    return _triton.device_type == "cuda" and all(t is None or t.is_cuda for t in tensors)


def _checks_in_passing(call: Call) -> bool:
    """Whether the kernels refuse what they cannot take, which is cheaper there than here."""
    return call.input.is_cpu and _native.loaded is not None


def _differentiates(call: Call) -> bool:
    input, weight, bias, residual = call[:4]
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _wants_bits(call: Call) -> bool:
    """Whether bits can take the place of the residual, or of a constant layer's input."""
    constants = (call.weight, call.bias)
    is_constant = not call.training and not any(
        t is not None and t.requires_grad for t in constants
    )
    return (
        (call.residual is not None or is_constant)
        and call.mask is None
        and call.act in activation.PIECEWISE_CONSTANT
    )


def _run_eagerly(call: Call) -> Tensor:
    """One operator call, and one autograd node where a gradient is wanted."""
    differentiates = _differentiates(call)
    save_bits = differentiates and _wants_bits(call)
    config = (call.eps, call.correction, call.act, call.act_param)
    tensors = call[:5]
    arguments: tuple[object, ...]
    if not call.training:
        operator = ops.forward
        arguments = (call.running_mean, call.running_var, *config, save_bits)
    else:
        buffers = (None,) * 4 if running_stats.is_recomputation() else call[5:9]
        operator = ops.forward_and_update
        arguments = (*buffers, call.momentum, call.unbiased, *config, save_bits)
    if differentiates:
        recomputes = call.memory_efficient and _recompute.is_possible()
        if recomputes:
            _recompute.replace_saved(call.input, call.residual)  # before there is an output
        output: Tensor = EagerBatchNorm.apply(
            *tensors, operator, arguments, (call.training, *config)
        )
        if recomputes:
            constants = _constants(call, _recompute.stats_of(output))
            again = (*constants, *config, save_bits and not _checks_in_passing(call))
            _recompute.attach(output, tensors, again)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output, _, _ = operator(*tensors, *arguments)
    if call.training:
        running_stats.mark_changed(*buffers[:2])
    return output


def _constants(call: Call, stats: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance with which the operator gives the same bits again; None is from the input.

    The CPU's kernels take them as they have stored them. Other kernels are compiled apart for
    evaluation: there the same call is the way to the same bits.
    """
    if not call.training:
        assert call.running_mean is not None  # as in every plain call
        assert call.running_var is not None
        return call.running_mean.detach().clone(), call.running_var.detach().clone()
    if _checks_in_passing(call) and call.correction == 0:
        return stats[0], stats[1]
    return None, None


def _run(call: Call) -> Tensor:
    """The general route: normalize by what fits the circumstances, then update the buffers."""
    x = call.input
    if x.dim() < 2:
        return x.clone()  # torch takes an empty vector, too
    mean, var = (None, None) if call.training else (call.running_mean, call.running_var)
    output: Tensor
    arguments = (*call[:5], mean, var, call.eps, call.correction, call.act, call.act_param, False)
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        output, stats, _ = record(ops.forward, *arguments)
    elif forward_ad._current_level >= 0:
        # Operators have no forward-mode formula; the plain expression does.
        output = reference.batch_norm(
            x, mean, var, call.weight, call.bias, call.eps, residual=call.residual, mask=call.mask,
            correction=call.correction, **activation.decode(call.act, call.act_param),
        )  # fmt: skip
        stats = ops.batch_statistics(x.detach(), call.mask) if call.training else None
    else:
        output, stats, _ = TransformableBatchNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    tracks = call.running_mean is not None or call.running_var is not None
    if call.training and tracks and not running_stats.are_fixed():
        running_stats.update(*call[5:9], stats, call.momentum, call.unbiased)
        running_stats.mark_changed(call.running_mean, call.running_var)
    return output


def _run_together(call: Call, peers: Peers) -> Tensor:
    """Training whose statistics are those of all processes of a group."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "batch_norm: group must be None under torch.func and in forward-mode differentiation: "
            "the processes' derivatives are exchanged in reverse mode alone."
        )
    x = call.input
    if x.dim() < 2:
        return x.clone()
    config = (call.eps, call.correction, call.act, call.act_param)
    place = (peers.group.group_name, peers.layer)
    output: Tensor
    try:
        if torch.compiler.is_compiling() or not _have_kernels(call[:9]):
            output, stats, _ = sync_batch_norm.forward(*call[:5], *config, False, *place)
        elif _differentiates(call):
            recomputes = call.memory_efficient and _recompute.is_possible()
            if recomputes:
                _recompute.replace_saved(x, call.residual)
            output, stats = sync_batch_norm.EagerSyncBatchNorm.apply(
                *call[:5], config, _wants_bits(call), *place
            )
            if recomputes:  # with the group's statistics, so nothing is exchanged again
                var = sync_batch_norm.normalizing_variance(stats, call.correction)
                again = (stats[0], var, call.eps, 0, call.act, call.act_param, False)
                _recompute.attach(output, call[:5], again)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, stats, _ = sync_batch_norm.forward(*call[:5], *config, False, *place)
    except sync_batch_norm.SingleValueError:  # in all processes alike
        if call.on_single_value == "running" and None not in (call.running_mean, call.running_var):
            return _run(call._replace(training=False))
        raise
    tracks = call.running_mean is not None or call.running_var is not None
    if tracks and not running_stats.is_recomputation():
        running_stats.update(*call[5:9], stats, call.momentum, call.unbiased)
        running_stats.mark_changed(call.running_mean, call.running_var)
    return output

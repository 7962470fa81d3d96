"""`instance_norm`: group norm with a group a channel, and running statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ops import activation, running_stats
from .._ops.group_norm import group_norm as operator
from ._checks import ArgumentError, check_eps, check_input, check_of_channels, is_tracing
from ._masks import prepare_mask
from .batch_norm import batch_norm


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    skipped_updates: Tensor | None = None,
) -> Tensor:
    r"""Instance normalization (Ulyanov et al. 2016, arXiv:1607.08022).

        y = act(weight * (x - mean) / √(var + eps) + bias)

    With `use_input_stats`, mean and biased variance are those of each sample and each channel, over
    all positions: `group_norm` with a group a channel, and as exact. Running statistics then move
    towards the mean over the samples of their means and of their *unbiased* variances:

        running = (1 - momentum) * running + momentum * batch

    Without it the running statistics normalize, as in the evaluation of `batch_norm`. A channel
    with a non-finite value, or with one value a sample under the mask, which has no unbiased
    variance, leaves its running statistics as they were and is counted in `skipped_updates`. An
    empty batch, one with nothing kept by the mask, and the second forward of an activation
    checkpoint update nothing. Under a mask every kept value has the same weight: the variance is
    that within the samples, pooled.

    Args:
        input: `(N, C, *)`; float64, float32, bfloat16 or float16, any strides.
        running_mean: `(C,)`, in units of x; updated in place with `use_input_stats`.
        running_var: `(C,)`, in units of x²; likewise.
        weight: γ, `(C,)`, of the input's dtype, or float32 for a half input. None is 1.
        bias: β, `(C,)`, likewise. None is 0.
        use_input_stats: normalize with the input's own statistics.
        momentum: the weight of the *new* value; None keeps the plain average over all batches,
            which needs `num_batches_tracked` (torch's layer silently keeps the start).
        eps: added to the variance, in units of x².
        act: an activation fused into the same pass, see `batch_norm`.
        act_param: the slope of "leaky_relu" below 0 (0.01) or alpha of "elu" (1.0).
        mask: bool, True where a position counts; broadcastable to `(N, *)`, or `(N, 1, *)`. Masked
            positions enter no statistic, give 0 and get a gradient of 0, whatever they hold.
        lengths: `(N,)` integers instead of a mask, for `(N, C, L)`: the first lengths[n] positions
            count.
        num_batches_tracked: a counter, incremented in place with the running statistics.
        skipped_updates: `(C,)` int64, incremented where a channel's update was refused.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes, sizes and eps that make no sense, and for one position; where torch
            raises RuntimeError, it is that as well.
        TypeError: for dtypes that do not go together.

    >>> x = torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])
    >>> mean, var = torch.zeros(1), torch.ones(1)
    >>> instance_norm(x, mean, var).flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    >>> mean, var  # 0.1 of the samples' means 2 and 20, unbiased variances 2 and 200
    (tensor([1.1000]), tensor([11.]))
    """
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ArgumentError(
                "instance_norm: Expected running_mean and running_var to be defined when "
                "use_input_stats is false"
            )
        return batch_norm(
            input, running_mean, running_var, weight, bias, eps=eps, act=act, act_param=act_param,
            mask=mask, lengths=lengths,
        )  # fmt: skip
    check_input(input, "instance_norm")
    check_eps(eps, "instance_norm")
    if not is_tracing():
        _check_sizes(input)
        if weight is not None:
            check_of_channels("weight", weight, input, "instance_norm")
        if bias is not None:
            check_of_channels("bias", bias, input, "instance_norm")
        if running_mean is not None:
            check_of_channels("running_mean", running_mean, input, "instance_norm")
        if running_var is not None:
            check_of_channels("running_var", running_var, input, "instance_norm")
    if act is None and act_param is None:
        fused = (0, 0.0)
    else:
        fused = activation.encode(act, act_param, "instance_norm")
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, 1, "instance_norm")
    settings = (input.shape[1], eps, *fused)
    if running_mean is None and running_var is None:
        return operator(input, None, weight, bias, mask, *settings)[0]
    _check_tracking(running_mean, running_var, momentum, num_batches_tracked)
    if running_stats.are_fixed():
        return operator(input, None, weight, bias, mask, *settings)[0]
    output, stats = operator.with_stats(input, weight, bias, mask, *settings)
    running_stats.update(
        running_mean, running_var, num_batches_tracked, skipped_updates, _of_channels(stats),
        momentum, True,
    )  # fmt: skip
    running_stats.mark_changed(running_mean, running_var)
    return output


def _of_channels(stats: Tensor) -> Tensor:
    """Mean, biased variance and values a sample of the channels, (3, C), from (3, N, C).

    The operator's unbiased variance of these, Σ(x - mean_n)² / (M - K) of M values in K samples, is
    the samples' pooled one.
    """
    mean, var, count = stats.unbind()
    total = count.sum(0)
    share = count / total.clamp(min=1)
    samples = (count > 0).sum(0).clamp(min=1)
    # A sample without values has statistics that mean nothing.
    mean, var = (torch.where(count > 0, t * share, 0.0).sum(0) for t in (mean, var))
    return torch.stack((mean, var, total / samples))


def _check_sizes(input: Tensor) -> None:
    if input.dim() < 2 or math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "Expected more than 1 spatial element when training, got input size "
            f"{input.size()}: with one value a channel its mean is the value itself, so every "
            "output would be the bias."
        )


def _check_tracking(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> None:
    if running_mean is None or running_var is None:
        raise ValueError(
            "instance_norm: running_mean and running_var must either both be None or neither be "
            "None"
        )
    if momentum is None and num_batches_tracked is None:
        raise ValueError(
            "instance_norm: num_batches_tracked must be given when momentum is None: the "
            "cumulative average divides by the number of batches. Got momentum=None, "
            "num_batches_tracked=None."
        )

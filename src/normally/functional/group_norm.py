"""`group_norm`: check, then call the operator."""

from __future__ import annotations

import math

from torch import Tensor

from .._ops import activation
from .._ops.group_norm import group_norm as operator
from ._checks import ArgumentError, check_eps, check_input, check_kind, is_tracing
from ._masks import prepare_mask


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Group normalization (Wu & He 2018, arXiv:1803.08494).

        y = act(weight * (x - mean) / √(var + eps) + bias)

    Mean and biased variance are those of each sample and each of `num_groups` groups of
    neighbouring channels, over the group's channels and all positions; γ and β are per channel. The
    same in training and in evaluation. A sample's result has the same bits in every batch.

    The error does not grow with |mean|/std, in channels_last neither, and a constant group becomes
    exactly `bias`. A sample with nothing kept by the mask is 0.

    Args:
        input: `(N, C, *)`; float64, float32, bfloat16 or float16, any strides.
        num_groups: divides C. C of them are instance norm, 1 is layer norm over (C, *).
        weight: γ, `(C,)`, of the input's dtype, or float32 for a half input. None is 1.
        bias: β, `(C,)`, likewise. None is 0.
        eps: added to the variance, in units of x².
        act: an activation fused into the same pass, see `batch_norm`; "silu" in diffusion models.
        act_param: the slope of "leaky_relu" below 0 (0.01) or alpha of "elu" (1.0).
        mask: bool, True where a position counts; broadcastable to `(N, *)`, or `(N, 1, *)`. Masked
            positions enter no statistic, give 0 and get a gradient of 0, whatever they hold.
        lengths: `(N,)` integers instead of a mask, for `(N, C, L)`: the first lengths[n] positions
            count.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes, sizes and eps that make no sense, and for one value a group; where
            torch raises RuntimeError, it is that as well.
        TypeError: for dtypes that do not go together.

    >>> import torch
    >>> x = torch.tensor([[[1.0], [3.0], [10.0], [30.0]]])
    >>> group_norm(x, 2).flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    >>> group_norm(x, 2, bias=torch.full((4,), 0.5), act="relu").flatten()
    tensor([0.0000, 1.5000, 0.0000, 1.5000])
    """
    check_input(input, "group_norm")
    check_eps(eps, "group_norm")
    if not is_tracing():
        _check_sizes(input, num_groups)
        if weight is not None:
            _check_parameter("weight", weight, input)
        if bias is not None:
            _check_parameter("bias", bias, input)
    if act is None and act_param is None:
        fused = (0, 0.0)
    else:
        fused = activation.encode(act, act_param, "group_norm")
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, 1, "group_norm")
    return operator(input, None, weight, bias, mask, num_groups, eps, *fused)[0]


def _check_sizes(input: Tensor, num_groups: int) -> None:
    shape = input.shape
    if len(shape) < 2:
        raise ArgumentError(
            "group_norm: Expected at least 2 dimensions for input tensor but received "
            f"{len(shape)}; its shape must be (N, C, *)."
        )
    if num_groups < 1:
        raise ArgumentError(
            f"group_norm: Expected num groups to be greater than 0, got {num_groups}"
        )
    n, channels = shape[:2]
    if channels % num_groups:
        raise ArgumentError(
            "group_norm: Expected number of channels in input to be divisible by num_groups, but "
            f"got input of shape {list(shape)} and num_groups={num_groups}"
        )
    # As torch, which lets one value a group pass if there is more than one sample.
    if n * channels == num_groups and math.prod(shape[2:]) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{[1, num_groups, *shape[2:]]}: with one value a group its mean is the value itself, "
            "so every output would be the bias. Use fewer groups."
        )


def _check_parameter(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != input.shape[1]:
        raise ArgumentError(
            f"group_norm: Expected {name} to be a vector of size equal to the number of channels "
            f"in input, but got {name} of shape {list(tensor.shape)} and input of shape "
            f"{list(input.shape)}"
        )
    check_kind(name, tensor, input, "group_norm")

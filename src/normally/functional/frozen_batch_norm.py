"""`frozen_batch_norm`: check, then call the operator."""

from __future__ import annotations

from torch import Tensor

from .._ops.frozen_batch_norm import frozen_batch_norm as operator
from ._checks import check_eps, check_input, check_of_channels, is_tracing
from ._masks import prepare_mask


def frozen_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization with constants: what fine-tuning a detector keeps of batch norm.

        y = weight * (x - running_mean) / √(running_var + eps) + bias

    One multiply-add a value. The derivative needs no x, so none is saved: the backward is the same
    function of the gradient, without the shifts.

    Args:
        input: `(N, C, *)`; float64, float32, bfloat16 or float16, any strides.
        running_mean: `(C,)`, in units of x.
        running_var: `(C,)`, in units of x².
        weight: γ, `(C,)`, of the input's dtype, or float32 for a half input. None is 1. If it
            requires a gradient it gets one, and then the input is saved.
        bias: β, `(C,)`, likewise. None is 0.
        eps: added to the variance, in units of x².
        mask: bool, True where a position counts; broadcastable to `(N, *)`, or `(N, 1, *)`. Masked
            positions give 0 and get a gradient of 0, whatever they hold.
        lengths: `(N,)` integers instead of a mask, for `(N, C, L)`: the first lengths[n] positions
            count.

    Returns:
        Shape, dtype, device and, if the input is dense, strides of `input`.

    Raises:
        ValueError: for shapes and eps that make no sense, and for running statistics that require
            a gradient.
        TypeError: for dtypes that do not go together.

    >>> import torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> frozen_batch_norm(x, torch.tensor([2.0, 20.0]), torch.tensor([4.0, 4.0]), eps=0.0)
    tensor([[-0.5000, -5.0000],
            [ 0.5000,  5.0000]])
    """
    check_input(input, "frozen_batch_norm")
    check_eps(eps, "frozen_batch_norm")
    if input.dim() < 2:
        raise ValueError(
            "frozen_batch_norm: input must have at least 2 dimensions (N, C, *). "
            f"Got {input.dim()}D input."
        )
    tensors = (running_mean, running_var, weight, bias)
    if not is_tracing():
        names = ("running_mean", "running_var", "weight", "bias")
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                check_of_channels(name, tensor, input, "frozen_batch_norm")
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, 1, "frozen_batch_norm")
    return operator(input, *tensors, mask, eps)

"""`layer_norm` and `add_layer_norm`: check, then call the operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from .._ops import activation
from .._ops.layer_norm import layer_norm as operator
from ._checks import (
    check_eps,
    check_input,
    check_of_rows,
    is_tracing,
    normalized_dims,
    prepare_sum,
)
from ._masks import in_layout_of, prepare_mask, rows_of_mask


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    dim: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Layer normalization (Ba et al. 2016, arXiv:1607.06450).

        y = act(weight * (x - mean) / √(var + eps) + bias)

    Mean and biased variance are those of each sample alone, over the last dimensions or over `dim`;
    the same in training and in evaluation. A sample's result has the same bits in every batch.

    The mean is kept to twice the precision of float32, and sums of differences from it are merged
    in float64: the output's error does not grow with |mean|/std, and a constant sample becomes
    exactly `bias`. A sample with nothing kept by the mask is 0.

    Args:
        input: `(*, *normalized_shape)`; float64, float32, bfloat16 or float16, any strides.
        normalized_shape: the sizes of the last dimensions, which are normalized together; with
            `dim`, the size of that one.
        weight: γ, of `normalized_shape` and the input's dtype, or float32 for a half input. None
            is 1.
        bias: β, likewise. None is 0.
        eps: added to the variance, in units of x².
        act: an activation fused into the same pass, see `batch_norm`.
        act_param: the slope of "leaky_relu" below 0 (0.01) or alpha of "elu" (1.0).
        dim: the one dimension to normalize over, wherever it is: 1 is channels first, without a
            copy.
        mask: bool, True where a position counts; broadcastable to the input without its last
            dimension (without `dim`), or 1 there. Masked positions enter no statistic, give 0 and
            get a gradient of 0, whatever they hold. It may differ inside a sample if
            `normalized_shape` has several dimensions; that runs on the reference formula.
        lengths: `(N,)` integers instead of a mask: the first lengths[n] positions count, along the
            one dimension that is neither the first nor the last (`dim`).

    Returns:
        Shape, dtype and device of `input`.

    Raises:
        ValueError: for shapes and eps that make no sense; where torch raises RuntimeError, it is
            that as well.
        TypeError: for dtypes that do not go together.

    >>> import torch
    >>> x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    >>> layer_norm(x, (2,))
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    >>> layer_norm(x.t(), 2, dim=0, act="relu")
    tensor([[0.0000, 0.0000],
            [1.0000, 1.0000]])
    >>> layer_norm(x, (2,), mask=torch.tensor([True, False]))
    tensor([[-1.0000,  1.0000],
            [ 0.0000,  0.0000]])
    """
    check_input(input, "layer_norm")
    return _layer_norm(
        input, None, normalized_shape, weight, bias, eps, act, act_param, dim, mask, lengths,
        "layer_norm",
    )[0]  # fmt: skip


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    act_param: float | None = None,
    dim: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`layer_norm` of input + residual, and that sum, in one pass.

        s = input + residual
        y = act(weight * (s - mean) / √(var + eps) + bias)

    The sum is rounded to its dtype first, so that `y` is what `layer_norm(s, …)` gives. Where the
    two dtypes differ it has the promoted one, as in torch. Masked positions of it are 0.

    Args:
        input: see `layer_norm`.
        residual: broadcastable to `input`.
        normalized_shape: see `layer_norm`, as all that follow.
        weight: γ.
        bias: β.
        eps: in units of x².
        act: an activation of y.
        act_param: its parameter.
        dim: the one dimension to normalize over.
        mask: True where a position counts.
        lengths: the number of positions that count.

    Returns:
        y and s.

    Raises:
        ValueError: as `layer_norm`, and for a residual that is not broadcastable.
        TypeError: as `layer_norm`.

    >>> import torch
    >>> x = torch.tensor([[1.0, 3.0]])
    >>> add_layer_norm(x, torch.ones(1, 2), (2,))
    (tensor([[-1.0000,  1.0000]]), tensor([[2., 4.]]))
    """
    input, residual = prepare_sum(input, residual, "add_layer_norm")
    return _layer_norm(
        input, residual, normalized_shape, weight, bias, eps, act, act_param, dim, mask, lengths,
        "add_layer_norm",
    )  # fmt: skip


def _layer_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    act_param: float | None,
    dim: int | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    caller: str,
) -> tuple[Tensor, Tensor]:
    check_eps(eps, caller)
    start, shape = normalized_dims(input, normalized_shape, dim, caller)
    if not is_tracing():
        if weight is not None:
            check_of_rows("weight", weight, input, shape, caller)
        if bias is not None:
            check_of_rows("bias", bias, input, shape, caller)
    if act is None and act_param is None:
        fused = (0, 0.0)
    else:
        fused = activation.encode(act, act_param, caller)
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, -1 if dim is None else dim, caller)
        rows = rows_of_mask(mask, start) if len(shape) > 1 else mask
        if rows is None:
            total = input if residual is None else reference.hide(input + residual, mask)
            output = reference.layer_norm(
                total, shape, weight, bias, eps, act=act, act_param=act_param, mask=mask
            )
            return in_layout_of(output, input), in_layout_of(total, input)
        mask = rows
    return operator(input, residual, weight, bias, mask, start, len(shape), eps, *fused)

"""`rms_norm` and `add_rms_norm`: check, then call the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._ops.rms_norm import CASTING_CODES
from .._ops.rms_norm import rms_norm as operator
from ._checks import (
    check_eps,
    check_input,
    check_of_rows,
    is_tracing,
    normalized_dims,
    prepare_sum,
)
from ._masks import in_layout_of, prepare_mask, rows_of_mask

_EPS, _EPS_OF_FLOAT64 = (reference.default_eps(dtype) for dtype in (torch.float32, torch.float64))


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting: str = "torch",
    zero_centered_weight: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

        y = weight * x / √(mean(x²) + eps)

    The mean is that of each sample alone, over the last dimensions; the same in training and in
    evaluation. A sample's result has the same bits in every batch. Half inputs are computed in
    float32; `casting` says where that is rounded.

    Args:
        input: `(*, *normalized_shape)`; float64, float32, bfloat16 or float16, any strides.
        normalized_shape: the sizes of the last dimensions, which are normalized together.
        weight: of `normalized_shape` and the input's dtype, or float32 for a half input; for
            another one, half as well, as torch takes it. None is 1.
        eps: added to mean(x²), in units of x²; None means the machine epsilon of float32, and of
            float64 for a float64 input.
        casting: "torch" rounds once, at the end; "llama" rounds to the input's dtype before the
            weight as well, as Hugging Face's Llama does; "gemma" rounds once, at the end.
        zero_centered_weight: multiply by 1 + weight, as Gemma does.
        mask: bool, True where a position counts; broadcastable to the input without its last
            dimension, or 1 there. Masked positions enter no statistic, give 0 and get a gradient
            of 0, whatever they hold. It may differ inside a sample if `normalized_shape` has
            several dimensions; that runs on the reference formula.
        lengths: `(N,)` integers instead of a mask: the first lengths[n] positions count, along the
            one dimension that is neither the first nor the last.

    Returns:
        Shape, dtype and device of `input`.

    Raises:
        ValueError: for shapes, eps and casting that make no sense; where torch raises RuntimeError,
            it is that as well.
        TypeError: for dtypes that do not go together.

    >>> x = torch.tensor([[1.0, -1.0], [3.0, 3.0]])
    >>> rms_norm(x, (2,), torch.tensor([1.0, 2.0]), eps=1e-5)
    tensor([[ 1.0000, -2.0000],
            [ 1.0000,  2.0000]])
    >>> rms_norm(x, (2,), torch.tensor([0.0, 1.0]), eps=1e-5, zero_centered_weight=True)
    tensor([[ 1.0000, -2.0000],
            [ 1.0000,  2.0000]])
    """
    check_input(input, "rms_norm")
    return _rms_norm(
        input, None, normalized_shape, weight, eps, casting, zero_centered_weight, mask, lengths,
        "rms_norm",
    )[0]  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting: str = "torch",
    zero_centered_weight: bool = False,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`rms_norm` of input + residual, and that sum, in one pass.

        s = input + residual
        y = weight * s / √(mean(s²) + eps)

    The sum is rounded to its dtype first, so that `y` is what `rms_norm(s, …)` gives. Where the two
    dtypes differ it has the promoted one, as in torch. Masked positions of it are 0.

    Args:
        input: see `rms_norm`.
        residual: broadcastable to `input`.
        normalized_shape: see `rms_norm`, as all that follow.
        weight: multiplies.
        eps: in units of x².
        casting: where a half result is rounded.
        zero_centered_weight: multiply by 1 + weight.
        mask: True where a position counts.
        lengths: the number of positions that count.

    Returns:
        y and s.

    Raises:
        ValueError: as `rms_norm`, and for a residual that is not broadcastable.
        TypeError: as `rms_norm`.

    >>> add_rms_norm(torch.tensor([[1.0, -3.0]]), torch.ones(1, 2), (2,), eps=1e-5)
    (tensor([[ 1.0000, -1.0000]]), tensor([[ 2., -2.]]))
    """
    input, residual = prepare_sum(input, residual, "add_rms_norm")
    return _rms_norm(
        input, residual, normalized_shape, weight, eps, casting, zero_centered_weight, mask,
        lengths, "add_rms_norm",
    )  # fmt: skip


def check_casting(casting: str, caller: str) -> int:
    """The order of casting as the operators know it."""
    code = CASTING_CODES.get(casting)
    if code is None:
        names = ", ".join(repr(name) for name in CASTING_CODES)
        raise ValueError(f"{caller}: casting must be one of {names}. Got casting={casting!r}.")
    return code


def _rms_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    casting: str,
    zero_centered_weight: bool,
    mask: Tensor | None,
    lengths: Tensor | None,
    caller: str,
) -> tuple[Tensor, Tensor]:
    if eps is None:
        eps = _EPS_OF_FLOAT64 if input.dtype is torch.float64 else _EPS
    else:
        check_eps(eps, caller)
    code = check_casting(casting, caller)
    start, shape = normalized_dims(input, normalized_shape, None, caller)
    if weight is not None and not is_tracing():
        if weight.dtype is not input.dtype:
            weight = _widened(weight, input.dtype)
        check_of_rows("weight", weight, input, shape, caller)
    if mask is not None or lengths is not None:
        mask = prepare_mask(input, mask, lengths, -1, caller)
        rows = rows_of_mask(mask, start) if len(shape) > 1 else mask
        if rows is None:
            total = input if residual is None else reference.hide(input + residual, mask)
            output = reference.rms_norm(
                total, shape, weight, eps, casting=casting,
                zero_centered_weight=zero_centered_weight, mask=mask,
            )  # fmt: skip
            return in_layout_of(output, input), in_layout_of(total, input)
        mask = rows
    return operator(input, residual, weight, None, mask, start, eps, code, zero_centered_weight)


def _widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a wider dtype of the input, which is exact; another one as it is."""
    if dtype.is_floating_point and torch.promote_types(weight.dtype, dtype) is dtype:
        return weight.to(dtype)
    return weight

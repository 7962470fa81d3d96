"""Our operators in torch's own, for what knows no others: the exporters to ONNX.

They are in torch's table of decompositions, where `torch.onnx.export` looks up what it has no
translation of; `torch.export` and `torch.compile` keep the operators as they are. The results agree
to rounding, with the accuracy of torch's formulas. What torch has no operator for, masks and batch
norm in training, is written in our reference's formula, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import activation
from . import batch_norm as batch_norm_ops
from . import frozen_batch_norm as frozen_batch_norm_ops
from ._library import register_decomposition
from .group_norm import group_norm as group_norm_ops
from .layer_norm import layer_norm as layer_norm_ops
from .local_response_norm import local_response_norm as local_response_norm_ops
from .norm import Norm
from .rms_norm import CASTING_CODES
from .rms_norm import rms_norm as rms_norm_ops

# ONNX has operators for these two; the reference spells them out.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


def _activate(z: Tensor, act: int, act_param: float) -> Tensor:
    decoded = activation.decode(act, act_param)
    own = _ACTIVATIONS.get(decoded["act"])
    return reference.activate(z, **decoded) if own is None else own(z)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    no_bits = input.new_empty((0, 0), dtype=torch.uint8)
    if mask is not None or mean is None or var is None:
        output = reference.batch_norm(
            input, mean, var, weight, bias, eps, residual=residual, mask=mask,
            correction=correction, **activation.decode(act, act_param),
        )  # fmt: skip
        if mean is None or var is None:
            return output, batch_norm_ops.batch_statistics(input, mask), no_bits
    else:
        output = F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)
        output = _activate(output if residual is None else output + residual, act, act_param)
    stats = torch.stack((mean, var, torch.zeros_like(mean))).to(batch_norm_ops.stats_dtype(input))
    return output, stats, no_bits


def _frozen_batch_norm(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    return _batch_norm(input, weight, bias, None, mask, mean, var, eps, 0, 0, 0.0, False)[0]


def _layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    start_dim: int,
    num_dims: int,
    eps: float,
    act: int,
    act_param: float,
) -> Tensor:
    last = input.dim() - 1
    is_last = start_dim + num_dims == input.dim()
    # If not it is one dimension. ONNX' older exporter takes no negative numbers here.
    x = input if is_last else input.movedim(start_dim, last)
    y = F.layer_norm(x, x.shape[x.dim() - num_dims :], weight, bias, eps)
    return _activate(y if is_last else y.movedim(last, start_dim), act, act_param)


def _group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    act: int,
    act_param: float,
) -> Tensor:
    if num_groups == input.shape[1] and input.dim() > 2:
        y = F.instance_norm(input, weight=weight, bias=bias, eps=eps)
    else:
        y = F.group_norm(input, num_groups, weight, bias, eps)
    return _activate(y, act, act_param)


def _rms_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    start_dim: int,
    eps: float,
    casting: int,
    zero_centered_weight: bool,
) -> Tensor:
    x = input if input.dtype is torch.float64 else input.float()
    dims = list(range(start_dim, input.dim()))
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if casting == CASTING_CODES["llama"]:
        y = y.to(input.dtype)
    if weight is not None:
        scale = weight if casting == CASTING_CODES["llama"] else weight.to(y.dtype)
        y = y * (1 + scale if zero_centered_weight else scale)
    return y.to(input.dtype)


def _local_response_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> Tensor:
    return F.local_response_norm(input, size, alpha, beta, k)


def _register_norm(norm: Norm, plain: Callable[..., Tensor]) -> None:
    """Register what a norm of `define_norm` is in torch's operators where it has no mask."""

    def decomposition(
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = input if residual is None else reference.hide(input + residual, mask)
        if mask is None:
            output = plain(total, weight, bias, *settings)
        else:
            output = norm.formula(total, weight, bias, mask, *settings)
        no_sum = input.new_empty(0) if residual is None else total
        if norm.statistics is None:
            return output, no_sum, input.new_empty(0)  # only our backward reads them
        return output, no_sum, norm.statistics(total, mask, *settings)

    register_decomposition(norm.forward, decomposition)


register_decomposition(batch_norm_ops.forward, _batch_norm)
register_decomposition(frozen_batch_norm_ops.operator, _frozen_batch_norm)
_register_norm(layer_norm_ops, _layer_norm)
_register_norm(group_norm_ops, _group_norm)
_register_norm(rms_norm_ops, _rms_norm)
_register_norm(local_response_norm_ops, _local_response_norm)

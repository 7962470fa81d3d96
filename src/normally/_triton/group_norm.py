"""Group norm on the GPU: moments of every channel of every sample, merged by group, then applied.

The kernels are batch norm's. Where a sample's channels lie one after the other in memory, all
samples' channels are seen as those of one, with parameters that repeat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, case, pointer_kinds
from .channel_apply import channel_apply_kernel, parameter
from .channel_gradient import channel_gradient_kernel, channel_gradient_sums_kernel
from .channel_moments import channel_moments_kernel, merged_moments
from .channel_tiles import OPTIONS, Tiles, cut, dense_like, dense_mask, rounded, wide

_CHUNK = 8
#: Values of a tile of partial results, and of the sums over samples.
_MERGED = 1024


@triton.jit
def _group_norm_statistics_kernel(
    stats_ptr,  # (3, units) float64: mean, biased variance and number of values
    partials_ptr,  # (3, units, parts) float64
    units,
    parts,
    BLOCK_U: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The statistics of every sample and group, which is a unit, from its channels' splits."""
    first = tl.program_id(0) * BLOCK_U
    mean, squares, count = merged_moments(partials_ptr, first, units, parts, BLOCK_U, PARTS)
    u = first + tl.arange(0, BLOCK_U)
    # Without values: mean 0 and variance 1, as the formula has it.
    var = tl.where(count > 0, squares / tl.maximum(count, 1.0), 1.0)
    tl.store(stats_ptr + u, mean, mask=u < units)
    tl.store(stats_ptr + wide(units) + u, var, mask=u < units)
    tl.store(stats_ptr + 2 * wide(units) + u, count, mask=u < units)


@triton.jit
def _group_norm_means_kernel(
    means_ptr,  # (2, units) float64
    partials_ptr,  # (2, units, parts) float64
    weight_ptr,  # (groups · channels of a group,) or None
    stats_ptr,  # (3, units) float64
    units,
    parts,
    groups,
    splits,
    BLOCK_U: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Σ weight·g / m and Σ weight·g·x̂ / m of every sample and group."""
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    k = tl.arange(0, PARTS)
    exists = (u < units)[:, None] & (k < parts)[None, :]
    lanes = wide(parts) * u[:, None] + k[None, :]
    c = (u % groups)[:, None] * (parts // splits) + (k // splits)[None, :]
    weight = parameter(weight_ptr, c, exists, 1.0, tl.float64)
    s = tl.load(partials_ptr + lanes, mask=exists, other=0.0)
    p = tl.load(partials_ptr + wide(units) * parts + lanes, mask=exists, other=0.0)
    count = tl.load(stats_ptr + 2 * wide(units) + u, mask=u < units, other=1.0)
    count = tl.maximum(count, 1.0)
    tl.store(means_ptr + u, tl.sum(weight * s, 1) / count, mask=u < units)
    tl.store(means_ptr + wide(units) + u, tl.sum(weight * p, 1) / count, mask=u < units)


@triton.jit
def _group_norm_parameters_kernel(
    grad_weight_ptr,  # (channels,) or None
    grad_bias_ptr,  # likewise
    partials_ptr,  # (2, samples, channels, splits) float64
    samples,
    channels,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ g·x̂ and Σ g of every channel over the samples, in an order that the sizes fix."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = wide(samples) * channels * splits
    s = tl.zeros((BLOCK_C, BLOCK_K), tl.float64)
    p = tl.zeros((BLOCK_C, BLOCK_K), tl.float64)
    for first in range(0, samples * splits, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        exists = (c < channels)[:, None] & (k < samples * splits)[None, :]
        sample = (k // splits).to(tl.int64)
        lanes = (sample[None, :] * channels + c[:, None]) * splits + (k % splits)[None, :]
        s += tl.load(partials_ptr + lanes, mask=exists, other=0.0)
        p += tl.load(partials_ptr + size + lanes, mask=exists, other=0.0)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + c, rounded(tl.sum(p, 1), grad_weight_ptr), mask=c < channels)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + c, rounded(tl.sum(s, 1), grad_bias_ptr), mask=c < channels)


def _shown(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask, 0)


def _walkable(like: Tensor) -> Tensor:
    """An empty tensor of the shape in which a sample is (channels, positions) or the reverse."""
    if like.is_contiguous() or like.movedim(1, -1).is_contiguous():
        return like
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _plan(x: Tensor, has_mask: bool) -> Tiles:
    """The tiles of a tensor that `_walkable` lets through."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    itemsize = x.element_size()
    if not x.is_contiguous():
        return cut(samples, positions, channels, 1, itemsize)
    if has_mask:  # which is that of one sample
        return cut(samples, 1, channels, positions, itemsize)
    return cut(1, 1, samples * channels, positions, itemsize, samples)


def _merging(units: int, parts: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """Grid and constants of the kernels that merge the parts of every unit."""
    size = triton.next_power_of_2(parts)
    block = max(1, _MERGED // size)
    warps = max(4, min(16, size // 512))
    return (triton.cdiv(units, block),), {
        "BLOCK_U": block, "PARTS": size, "num_warps": warps, **OPTIONS,
    }  # fmt: skip


def forward(
    output: Tensor,
    total: Tensor,
    stats: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    num_groups: int,
    eps: float,
    act: int,
    act_param: float,
) -> None:
    """`normally::group_norm`."""
    if residual is not None:
        input = total.copy_(_shown(input + residual, mask))
    if input.numel() == 0:
        stats.zero_()
        return
    y = _walkable(output)
    x = dense_like(input, y)
    tiles = _plan(y, mask is not None)
    units, channels = input.shape[0] * num_groups, input.shape[1]
    parts = channels // num_groups * tiles.splits
    partials = stats.new_empty((3, units, parts))
    mask = dense_mask(mask, y)
    channel_moments_kernel[tiles.grid](
        x, mask, partials, tiles.batch, *tiles.shape, CHUNK=_CHUNK if mask is None else 1,
        **tiles.constants,
    )  # fmt: skip
    grid, merging = _merging(units, parts)
    _group_norm_statistics_kernel[grid](stats, partials, units, parts, **merging)
    channel_apply_kernel[tiles.grid](
        y, None, None, x, None, mask, weight, bias, *stats.unbind(), units // tiles.batch, channels,
        *tiles.shape, EPS=eps, CORRECTION=0, ACT=act, ACT_PARAM=act_param, **tiles.constants,
    )  # fmt: skip
    if y is not output:
        output.copy_(y)


def backward(
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    num_groups: int,
    eps: float,
    act: int,
    act_param: float,
    need: int,
) -> None:
    """`normally::group_norm_backward`."""
    if input.numel() == 0:
        for gradient in (grad_input, grad_weight, grad_bias):
            gradient.zero_()
        return
    dx = _walkable(grad_input if grad_input.numel() else torch.empty_like(input))
    x, g = dense_like(input, dx), dense_like(grad_output, dx)
    tiles = _plan(dx, mask is not None)
    samples, channels = input.shape[:2]
    units = samples * num_groups
    parts = channels // num_groups * tiles.splits
    partials = stats.new_empty((2, units, parts))
    bytes_of_mask = dense_mask(mask, dx)
    operands = (g, None, x, None, bytes_of_mask, weight, bias, stats)
    sizes = (tiles.batch, units // tiles.batch, channels, *tiles.shape)
    constants: dict[str, Any] = {
        "EPS": eps, "CORRECTION": 0, "ACT": act, "ACT_PARAM": act_param, **tiles.constants,
    }  # fmt: skip
    channel_gradient_sums_kernel[tiles.grid](partials, *operands, *sizes, **constants)
    if grad_input.numel():
        means = stats.new_empty((2, units))
        grid, merging = _merging(units, parts)
        _group_norm_means_kernel[grid](
            means, partials, weight, stats, units, parts, num_groups, tiles.splits, **merging
        )
        channel_gradient_kernel[tiles.grid](dx, None, *operands, means, *sizes, **constants)
        if dx is not grad_input:
            grad_input.copy_(dx)
        if grad_sum is not None:
            grad_input.add_(_shown(grad_sum, mask))
    if grad_weight.numel() or grad_bias.numel():
        terms = min(256, triton.next_power_of_2(samples * tiles.splits))
        block = max(1, _MERGED // terms)
        _group_norm_parameters_kernel[(triton.cdiv(channels, block),)](
            grad_weight if grad_weight.numel() else None,
            grad_bias if grad_bias.numel() else None,
            partials, samples, channels, tiles.splits, BLOCK_C=block, BLOCK_K=terms, **OPTIONS,
        )  # fmt: skip


def compile_cases() -> list[Case]:
    """What `make gpu-compile` compiles; the rest is batch norm's."""
    kinds = pointer_kinds("*fp32")
    cases = []
    for parts in (4, 256, 4096):
        _, merging = _merging(64, parts)
        cases += [
            case(f"statistics of {parts}", _group_norm_statistics_kernel, kinds, merging),
            case(f"means of {parts}", _group_norm_means_kernel, kinds, merging),
        ]
    constants = {"BLOCK_C": 4, "BLOCK_K": 256, "num_warps": 4}
    return [*cases, case("parameters", _group_norm_parameters_kernel, kinds, constants)]

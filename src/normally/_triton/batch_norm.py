"""Batch norm on the GPU: one launch where a channel's values stay in cache, else three.

Forward: moments of the splits, their merge (and the running statistics), the output. Backward: sums
of the splits, their merge (and the gradients of γ and β), the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, case, pointer_kinds
from .channel_apply import apply_tiles, channel_apply_kernel, parameter, scaled, statistics_of
from .channel_gradient import (
    channel_gradient_kernel,
    channel_gradient_sums_kernel,
    gradient_sums_of,
    gradient_tiles,
)
from .channel_moments import channel_moments_kernel, merged_moments, moments_of
from .channel_tiles import (
    OPTIONS,
    Tiles,
    accumulator,
    cut,
    dense_like,
    dense_mask,
    program_of,
    rounded,
    wide,
)
from .running_stats import stride_of, two_floats, update, update_channels

#: Tiles between two merges in float64, and channels that one program merges.
CHUNK = 8
MERGED_CHANNELS = 16


@triton.jit
def _record(
    stats_ptr,  # (3, channels) float64
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    skipped_updates_ptr,
    mean_stride,
    var_stride,
    factor_high,
    factor_low,
    c,
    channels,
    is_first,
    mean,
    var,
    count,
    UNBIASED: tl.constexpr,
):
    """Save the statistics of channels c and move the running ones."""
    exists = c < channels
    tl.store(stats_ptr + c, mean, mask=exists)
    tl.store(stats_ptr + channels + c, var, mask=exists)
    tl.store(stats_ptr + 2 * channels + c, count, mask=exists)
    factor = tl.full((), factor_high, tl.float64) + tl.full((), factor_low, tl.float64)
    batches = tl.full((), 0, tl.int64)
    update_channels(
        running_mean_ptr, running_var_ptr, skipped_updates_ptr, mean_stride, var_stride, c, exists,
        mean, var, count, factor, batches, UNBIASED, False,
    )  # fmt: skip
    if num_batches_tracked_ptr is not None:
        # Every channel has as many values; the first program counts for all.
        if is_first & (tl.max(count, 0) > 0):
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


@triton.jit
def batch_norm_statistics_kernel(
    stats_ptr,  # (3, channels) float64
    partials_ptr,  # (3, channels, splits) float64
    running_mean_ptr,  # (channels,) at a stride, or None
    running_var_ptr,  # likewise
    num_batches_tracked_ptr,  # one int64, or None
    skipped_updates_ptr,  # (channels,) or None
    mean_stride,
    var_stride,
    factor_high,
    factor_low,
    channels,
    splits,
    UNBIASED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PARTS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_U
    mean, squares, count = merged_moments(partials_ptr, first, channels, splits, BLOCK_U, PARTS)
    # Without values: mean 0 and variance 1, as the formula has it.
    var = tl.where(count > 0, squares / tl.maximum(count, 1.0), 1.0)
    _record(
        stats_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, skipped_updates_ptr,
        mean_stride, var_stride, factor_high, factor_low, first + tl.arange(0, BLOCK_U), channels,
        tl.program_id(0) == 0, mean, var, count, UNBIASED,
    )  # fmt: skip


@triton.jit
def _batch_norm_forward_kernel(
    output_ptr,  # (outer, channels, inner), as x and the residual
    bits_ptr,  # (rows, bytes a row) or None
    stats_ptr,  # (3, channels) float64
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # (positions,) or None
    weight_ptr,  # (channels,) or None
    bias_ptr,  # likewise
    running_mean_ptr,  # (channels,) at a stride, or None
    running_var_ptr,  # likewise
    num_batches_tracked_ptr,  # one int64, or None
    skipped_updates_ptr,  # (channels,) or None
    mean_stride,
    var_stride,
    factor_high,
    factor_low,
    outer,
    channels,
    pitch_units,
    row_blocks,
    blocks,
    splits,
    UNBIASED: tl.constexpr,
    EPS: tl.constexpr,
    CORRECTION: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Everything about BLOCK_C channels in one program; what it reads twice is in cache."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    batch, channel, _ = program_of(splits, channels, BLOCK_C)
    pitch = pitch_units * UNIT
    mean, squares, count = moments_of(
        x_ptr, mask_ptr, batch, channel, 0, blocks, outer, channels, pitch, row_blocks, BLOCK_C,
        BLOCK_P, BY_COLUMN, CHUNK,
    )  # fmt: skip
    var = tl.where(count > 0, squares / tl.maximum(count, 1.0), 1.0)
    c = channel + tl.arange(0, BLOCK_C)
    _record(
        stats_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, skipped_updates_ptr,
        mean_stride, var_stride, factor_high, factor_low, c, channels, channel == 0, mean, var,
        count, UNBIASED,
    )  # fmt: skip
    if CORRECTION != 0:
        var = var * (count / tl.maximum(count - CORRECTION, 1.0))
    unit, high, low, rstd = scaled(mean, var, EPS, NARROW)
    weight = parameter(weight_ptr, c, c < channels, 1.0, NARROW)
    bias = parameter(bias_ptr, c, c < channels, 0.0, NARROW)
    apply_tiles(
        output_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit, high, low, weight * rstd, bias,
        batch, channel, 0, blocks, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN,
        ACT, ACT_PARAM,
    )  # fmt: skip


@triton.jit
def _means_of(s, p, weight, count, CORRECTION: tl.constexpr):
    """A and B of the input's gradient, and what they are without values: 0."""
    w = weight.to(tl.float64)
    return w * s / tl.maximum(count, 1.0), w * p / tl.maximum(count - CORRECTION, 1.0)


@triton.jit
def _store_parameter_gradients(grad_weight_ptr, grad_bias_ptr, c, exists, s, p):
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + c, rounded(p, grad_weight_ptr), mask=exists)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + c, rounded(s, grad_bias_ptr), mask=exists)


@triton.jit
def _batch_norm_means_kernel(
    means_ptr,  # (2, channels) float64, or None in evaluation
    grad_weight_ptr,  # (channels,) or None
    grad_bias_ptr,  # likewise
    partials_ptr,  # (2, channels, splits) float64
    weight_ptr,  # (channels,) or None
    stats_ptr,  # (3, channels) float64
    channels,
    splits,
    CORRECTION: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PARTS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    k = tl.arange(0, PARTS)
    exists = c < channels
    lanes = c.to(tl.int64)[:, None] * splits + k[None, :]
    there = exists[:, None] & (k < splits)[None, :]
    size = wide(channels) * splits
    s = tl.sum(tl.load(partials_ptr + lanes, mask=there, other=0.0), 1)
    p = tl.sum(tl.load(partials_ptr + size + lanes, mask=there, other=0.0), 1)
    _store_parameter_gradients(grad_weight_ptr, grad_bias_ptr, c, exists, s, p)
    if means_ptr is not None:
        count = tl.load(stats_ptr + 2 * channels + c, mask=exists, other=1.0)
        weight = parameter(weight_ptr, c, exists, 1.0, tl.float64)
        a, b = _means_of(s, p, weight, count, CORRECTION)
        tl.store(means_ptr + c, a, mask=exists)
        tl.store(means_ptr + channels + c, b, mask=exists)


@triton.jit
def _batch_norm_backward_kernel(
    grad_input_ptr,  # (outer, channels, inner), as all tensors of that size; or None
    grad_residual_ptr,  # or None
    grad_weight_ptr,  # (channels,) or None
    grad_bias_ptr,  # likewise
    grad_ptr,
    bits_ptr,  # (rows, bytes a row) or None
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # (positions,) or None
    weight_ptr,  # (channels,) or None
    bias_ptr,  # likewise
    stats_ptr,  # (3, channels) float64
    outer,
    channels,
    pitch_units,
    row_blocks,
    blocks,
    splits,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr,
    CORRECTION: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Everything about BLOCK_C channels in one program; what it reads twice is in cache."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    batch, channel, _ = program_of(splits, channels, BLOCK_C)
    pitch = pitch_units * UNIT
    c = channel + tl.arange(0, BLOCK_C)
    exists = c < channels
    mean, var = statistics_of(
        stats_ptr, stats_ptr + channels, stats_ptr + 2 * channels, batch, c, exists, channels,
        channels, CORRECTION,
    )  # fmt: skip
    unit, high, low, rstd = scaled(mean, var, EPS, NARROW)
    weight = parameter(weight_ptr, c, exists, 1.0, NARROW)
    bias = parameter(bias_ptr, c, exists, 0.0, NARROW)
    s, p = gradient_sums_of(
        grad_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit, high, low, weight * rstd, bias,
        batch, channel, 0, blocks, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN,
        ACT, ACT_PARAM,
    )  # fmt: skip
    p = p * rstd.to(tl.float64)
    _store_parameter_gradients(grad_weight_ptr, grad_bias_ptr, c, exists, s, p)
    a = tl.zeros((BLOCK_C,), NARROW)
    b = tl.zeros((BLOCK_C,), NARROW)
    if TRAINING:
        count = tl.load(stats_ptr + 2 * channels + c, mask=exists, other=1.0)
        wide_a, wide_b = _means_of(s, p, weight, count, CORRECTION)
        a, b = wide_a.to(NARROW), wide_b.to(NARROW)
    gradient_tiles(
        grad_input_ptr, grad_residual_ptr, grad_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit,
        high, low, rstd, weight, bias, a, b, batch, channel, 0, blocks, outer, channels, pitch,
        row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN, ACT, ACT_PARAM,
    )  # fmt: skip


# A program that works alone on its channels reads them twice: they must stay in the second-level
# cache, and the programs must be enough to fill the GPU; or the launches are what costs.
_ALONE_BYTES, _ALONE_PROGRAMS, _TINY_BYTES = 256 << 10, 128, 1 << 19


def tiles_of(x: Tensor) -> Tiles:
    """The tiles of a dense tensor."""
    channels = x.shape[1]
    inner = x.stride(1) if channels > 1 else x.numel()
    return cut(1, x.numel() // (channels * inner), channels, inner, x.element_size())


def _plan(x: Tensor) -> tuple[Tiles, bool]:
    """The tiles of a dense tensor, and whether one program is to do all about a channel."""
    channels, itemsize = x.shape[1], x.element_size()
    tiles = tiles_of(x)
    slab = x.numel() // channels * tiles.block_c * itemsize
    programs = triton.cdiv(channels, tiles.block_c)
    alone = tiles.splits == 1 or x.numel() * itemsize <= _TINY_BYTES
    alone = alone or (slab <= _ALONE_BYTES and programs >= _ALONE_PROGRAMS)
    return (tiles._replace(splits=1), True) if alone else (tiles, False)


def or_none(output: Tensor) -> Tensor | None:
    """An output, None where it is not asked for."""
    return output if output.numel() else None


def forward_and_update(
    output: Tensor,
    stats: Tensor,
    bits: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_updates: Tensor | None,
    momentum: float | None,
    unbiased: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    save_bits: bool,
) -> None:
    """`normally::batch_norm_and_update_`: training."""
    if input.numel() == 0:
        stats.zero_()
        return
    x, residual = dense_like(input, output), dense_like(residual, output)
    mask = dense_mask(mask, output)
    tiles, alone = _plan(output)
    # The cumulative average needs the count of batches before any channel moves.
    buffers = (running_mean, running_var, num_batches_tracked, skipped_updates)
    moved = buffers if momentum is not None else (None,) * 4
    moving = (
        *moved, stride_of(moved[0]), stride_of(moved[1]), *two_floats(momentum or 0.0),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "EPS": eps, "CORRECTION": correction, "ACT": act, "ACT_PARAM": act_param,
        **tiles.constants,
    }  # fmt: skip
    saved = or_none(bits)
    chunk = 1 if mask is not None else CHUNK
    if alone:
        _batch_norm_forward_kernel[tiles.grid](
            output, saved, stats, x, residual, mask, weight, bias, *moving, *tiles.shape,
            UNBIASED=unbiased, CHUNK=chunk, **constants,
        )  # fmt: skip
    else:
        channels = tiles.channels
        partials = stats.new_empty((3, 1, channels, tiles.splits))
        channel_moments_kernel[tiles.grid](
            x, mask, partials, 1, *tiles.shape, CHUNK=chunk, **tiles.constants
        )
        batch_norm_statistics_kernel[(triton.cdiv(channels, MERGED_CHANNELS),)](
            stats, partials, *moving, channels, tiles.splits, UNBIASED=unbiased,
            BLOCK_U=MERGED_CHANNELS, PARTS=triton.next_power_of_2(tiles.splits), **OPTIONS,
        )  # fmt: skip
        channel_apply_kernel[tiles.grid](
            output, saved, None, x, residual, mask, weight, bias, *stats.unbind(), channels,
            channels, *tiles.shape, **constants,
        )  # fmt: skip
    if momentum is None:
        update(*buffers, stats, None, unbiased)


def forward(
    output: Tensor,
    stats: Tensor,
    bits: Tensor,
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
) -> None:
    """`normally::batch_norm`: with the batch's statistics, or with those that are given."""
    if mean is None or var is None:
        forward_and_update(
            output, stats, bits, input, weight, bias, residual, mask, None, None, None, None, 0.0,
            False, eps, correction, act, act_param, save_bits,
        )  # fmt: skip
        return
    if input.numel() == 0:
        stats.zero_()
        return
    tiles, _ = _plan(output)
    channel_apply_kernel[tiles.grid](
        output, or_none(bits), stats, dense_like(input, output), dense_like(residual, output),
        dense_mask(mask, output), weight, bias, mean.contiguous(), var.contiguous(), stats,
        tiles.channels, tiles.channels, *tiles.shape, EPS=eps, CORRECTION=0, ACT=act,
        ACT_PARAM=act_param, **tiles.constants,
    )  # fmt: skip


def backward(
    grad_input: Tensor,
    grad_residual: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> None:
    """`normally::batch_norm_backward`."""
    if input.numel() == 0:
        for gradient in (grad_input, grad_residual, grad_weight, grad_bias):
            gradient.zero_()
        return
    like = grad_input if grad_input.numel() else torch.empty_like(input)
    x, g = dense_like(input, like), dense_like(grad_output, like)
    residual, mask = dense_like(residual, like), dense_mask(mask, like)
    targets = [or_none(t) for t in (grad_input, grad_residual, grad_weight, grad_bias)]
    tiles, alone = _plan(like)
    correction = correction if training else 0
    constants: dict[str, Any] = {
        "EPS": eps, "CORRECTION": correction, "ACT": act, "ACT_PARAM": act_param,
        **tiles.constants,
    }  # fmt: skip
    operands = (g, bits, x, residual, mask, weight, bias, stats)
    if alone:
        _batch_norm_backward_kernel[tiles.grid](
            *targets, *operands, *tiles.shape, TRAINING=training, **constants
        )
        return
    channels = tiles.channels
    means = None
    if training or targets[2] is not None or targets[3] is not None:
        partials = stats.new_empty((2, 1, channels, tiles.splits))
        means = stats.new_empty((2, 1, channels)) if training else None
        channel_gradient_sums_kernel[tiles.grid](
            partials, *operands, 1, channels, channels, *tiles.shape, **constants
        )
        _batch_norm_means_kernel[(triton.cdiv(channels, MERGED_CHANNELS),)](
            means, *targets[2:], partials, weight, stats, channels, tiles.splits,
            CORRECTION=correction, BLOCK_U=MERGED_CHANNELS,
            PARTS=triton.next_power_of_2(tiles.splits), **OPTIONS,
        )  # fmt: skip
    if targets[0] is not None or targets[1] is not None:
        channel_gradient_kernel[tiles.grid](
            *targets[:2], *operands, means, 1, channels, channels, *tiles.shape, **constants
        )


def compile_cases() -> list[Case]:
    """What `make gpu-compile` compiles: a ResNet's first and last norm and a channels-last one."""
    shapes = {"planes": (256, 64, 12544), "7 x 7": (256, 2048, 49), "columns": (802816, 256, 1)}
    cases = []
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        for shape, (outer, channels, inner) in shapes.items():
            tiles = cut(1, outer, channels, inner, itemsize)
            cases += _cases_of(f"{dtype} {shape}", f"*{dtype}", tiles)
    cases += _cases_of("fp64 planes", "*fp64", cut(1, 256, 64, 12544, 8))
    merged = {"BLOCK_U": MERGED_CHANNELS, "PARTS": 64, "num_warps": 4}
    kinds = pointer_kinds("*fp32")
    return [
        *cases,
        case("statistics", batch_norm_statistics_kernel, kinds, {"UNBIASED": True, **merged}),
        case("means", _batch_norm_means_kernel, kinds, {"CORRECTION": 0, **merged}),
    ]


def _cases_of(name: str, dtype: str, tiles: Tiles) -> list[Case]:
    """BN + add + ReLU with saved bits, and BN + SiLU under a mask, of one cut."""
    added = pointer_kinds(dtype)
    masked = {**added, "bits": None, "residual": None, "grad_residual": None, "mask": "*u8"}
    saved = {**added, "residual": None}  # the backward has bits instead
    forward = {"EPS": 1e-5, "CORRECTION": 0, **tiles.constants}
    relu, silu = {"ACT": 1, "ACT_PARAM": 0.0, **forward}, {"ACT": 5, "ACT_PARAM": 0.0, **forward}
    alone = {"UNBIASED": True, "CHUNK": CHUNK}
    whole = {**tiles.constants, "CHUNK": CHUNK}
    variants: list[tuple[str, Any, dict[str, str | None], dict[str, Any]]] = [
        ("moments", channel_moments_kernel, {**added, "mask": None}, whole),
        ("moments masked", channel_moments_kernel, masked, {**whole, "CHUNK": 1}),
        ("apply add relu", channel_apply_kernel, {**added, "stats": None}, relu),
        ("apply silu masked", channel_apply_kernel, {**masked, "stats": None}, silu),
        ("sums add relu", channel_gradient_sums_kernel, saved, relu),
        ("sums silu masked", channel_gradient_sums_kernel, masked, silu),
        ("gradient add relu", channel_gradient_kernel, saved, relu),
        ("gradient silu masked", channel_gradient_kernel, masked, silu),
        ("alone add relu", _batch_norm_forward_kernel, added, {**relu, **alone}),
        ("alone backward add relu", _batch_norm_backward_kernel, saved, {**relu, "TRAINING": True}),
    ]
    return [
        case(f"{what} {name}", kernel, kinds, constants, tiles.divisible)
        for what, kernel, kinds, constants in variants
    ]

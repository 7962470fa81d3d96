"""The running statistics of batch norm on the device: no synchronization, one writer a channel."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, case, pointer_kinds
from .channel_tiles import OPTIONS, rounded


def two_floats(value: float) -> tuple[float, float]:
    """A number as the sum of two of float32, which is what a kernel's float argument is."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def stride_of(buffer: Tensor | None) -> int:
    return 1 if buffer is None or buffer.numel() < 2 else buffer.stride(0)


@triton.jit
def _holds(ptr, value):
    """Whether the buffer's dtype can hold a statistic; a buffer that is not there can."""
    if ptr is None:
        holds = tl.full(value.shape, True, tl.int1)
    else:
        holds = tl.abs(rounded(value, ptr).to(tl.float64)) < float("inf")
    return holds


@triton.jit
def _move(ptr, stride, c, sound, value, factor):
    if ptr is not None:
        at = ptr + c.to(tl.int64) * stride
        old = tl.load(at, mask=sound, other=0.0).to(tl.float64)
        new = old * (1.0 - factor) + value * factor
        tl.store(at, rounded(new, ptr), mask=sound)


@triton.jit
def update_channels(
    running_mean_ptr,  # (channels,) at a stride, or None
    running_var_ptr,  # likewise
    skipped_updates_ptr,  # (channels,) or None
    mean_stride,
    var_stride,
    c,
    exists,
    mean,
    var,
    count,
    factor,
    batches,  # counted so far, this one included; read where CUMULATIVE
    UNBIASED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Move the buffers of channels c, that have values, towards the batch's statistics.

    One that its buffer cannot hold leaves both as they were and is counted.
    """
    has_values = exists & (count > 0)
    sound = has_values
    if UNBIASED:
        var = var * (count / tl.maximum(count - 1, 1.0))
        sound = sound & (count > 1)
    sound = sound & _holds(running_mean_ptr, mean) & _holds(running_var_ptr, var)
    if skipped_updates_ptr is not None:
        skipped = tl.load(skipped_updates_ptr + c, mask=has_values, other=0)
        skipped += (has_values & (sound == 0)).to(tl.int64)
        tl.store(skipped_updates_ptr + c, skipped, mask=has_values)
        if CUMULATIVE:
            factor = 1.0 / tl.maximum(batches - skipped, 1).to(tl.float64)
    elif CUMULATIVE:
        factor = 1.0 / tl.maximum(batches, 1).to(tl.float64)
    _move(running_mean_ptr, mean_stride, c, sound, mean, factor)
    _move(running_var_ptr, var_stride, c, sound, var, factor)


@triton.jit
def _update_running_stats_kernel(
    running_mean_ptr,  # (channels,) at a stride, or None
    running_var_ptr,  # likewise
    num_batches_tracked_ptr,  # one int64, or None
    skipped_updates_ptr,  # (channels,) or None
    stats_ptr,  # (3, channels) float64
    mean_stride,
    var_stride,
    channels,
    factor_high,
    factor_low,
    UNBIASED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All channels in one program: the count of batches must be known before any factor."""
    some = 0
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        count = tl.load(stats_ptr + 2 * channels + c, mask=c < channels, other=0.0)
        some = tl.maximum(some, tl.max((count > 0).to(tl.int32), 0))
    batches = tl.full((), 1, tl.int64)
    if num_batches_tracked_ptr is not None:
        batches = tl.load(num_batches_tracked_ptr) + some
        tl.store(num_batches_tracked_ptr, batches)
    factor = tl.full((), factor_high, tl.float64) + tl.full((), factor_low, tl.float64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        exists = c < channels
        mean = tl.load(stats_ptr + c, mask=exists, other=0.0)
        var = tl.load(stats_ptr + channels + c, mask=exists, other=0.0)
        count = tl.load(stats_ptr + 2 * channels + c, mask=exists, other=0.0)
        update_channels(
            running_mean_ptr, running_var_ptr, skipped_updates_ptr, mean_stride, var_stride, c,
            exists, mean, var, count, factor, batches, UNBIASED, CUMULATIVE,
        )  # fmt: skip


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_updates: Tensor | None,
    stats: Tensor,
    momentum: float | None,
    unbiased: bool,
) -> None:
    """`normally::update_running_stats_`."""
    channels = stats.shape[1]
    if channels == 0:
        return
    _update_running_stats_kernel[(1,)](
        running_mean, running_var, num_batches_tracked, skipped_updates, stats,
        stride_of(running_mean), stride_of(running_var), channels, *two_floats(momentum or 0.0),
        UNBIASED=unbiased, CUMULATIVE=momentum is None,
        BLOCK_C=min(1024, triton.next_power_of_2(channels)), **OPTIONS,
    )  # fmt: skip


def compile_cases() -> list[Case]:
    """What `make gpu-compile` compiles."""
    kinds = pointer_kinds("*fp32")
    return [
        case(
            f"update {'cumulative' if cumulative else 'by momentum'}",
            _update_running_stats_kernel, kinds,
            {"UNBIASED": True, "CUMULATIVE": cumulative, "BLOCK_C": 1024, "num_warps": 4},
        )
        for cumulative in (False, True)
    ]  # fmt: skip

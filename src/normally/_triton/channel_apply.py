"""y = act(weight * (x - mean) / √(var + eps) + bias + residual), for every channel's statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .channel_tiles import accumulator, kept_lanes, program_of, range_of, tile_at, wide


@triton.jit
def power_of_two(x):
    """The largest power of two not above x > 0, in float64: its bits without the mantissa."""
    bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def scaled(mean, var, EPS: tl.constexpr, NARROW: tl.constexpr):
    """What x̂ is computed from in few bits: (unit, high, low, rstd), from float64.

        x̂ = (x·unit - high - low) · rstd

    `unit` is a power of two near 1/√(var + eps), so that neither the difference of two values nor
    its product with rstd leaves the range of float32; high + low is mean·unit.
    """
    std = tl.sqrt(var + EPS)
    # Not so small a unit that mean·unit overflows: values as far as that from 0 are all equal.
    size = power_of_two(tl.maximum(std, tl.abs(mean) * 7.888609052210118e-31))  # 2^-100
    size = tl.maximum(size, 2.350988701644575e-38)  # 2^-125
    unit = 1.0 / size
    high = (mean * unit).to(NARROW)
    low = (mean * unit - high.to(tl.float64)).to(NARROW)
    return unit.to(NARROW), high, low, (size / std).to(NARROW)


@triton.jit
def statistics_of(
    mean_ptr,  # (batch, groups)
    var_ptr,  # likewise
    count_ptr,  # likewise; read where CORRECTION is not 0
    batch,
    c,
    exists,
    channels,
    groups,
    CORRECTION: tl.constexpr,
):
    """Mean and normalizing variance of channels c in float64, the groups' where they have one."""
    at = wide(batch) * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + at, mask=exists, other=0.0).to(tl.float64)
    var = tl.load(var_ptr + at, mask=exists, other=1.0).to(tl.float64)
    if CORRECTION != 0:
        count = tl.load(count_ptr + at, mask=exists, other=2.0)
        var = var * (count / tl.maximum(count - CORRECTION, 1.0))
    return mean, var


@triton.jit
def parameter(ptr, c, exists, default, NARROW: tl.constexpr):
    """A parameter at c; where there is none, its neutral value."""
    if ptr is None:
        value = tl.full(c.shape, default, NARROW)
    else:
        value = tl.load(ptr + c, mask=exists, other=0.0).to(NARROW)
    return value


@triton.jit
def pack_bits(
    bits_ptr,  # (rows, bytes a row)
    bits,
    batch,
    channel,
    block,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Save a tile's bits, eight neighbours in memory a byte; the last byte of a row is filled up.

    A row is as long as `pitch`. As in csrc/bits.h, but for rows of 2 to 8 positions.
    """
    row_bytes = tl.cdiv(pitch, 8)
    weights = (1 << tl.arange(0, 8)).to(tl.int32)
    if BY_COLUMN:
        eight = tl.reshape(bits.to(tl.int32), (BLOCK_C // 8, 8, BLOCK_P))
        value = tl.sum(eight * weights[None, :, None], 1)
        c = tl.arange(0, BLOCK_C // 8)
        p = tl.arange(0, BLOCK_P)
        first = wide(block) * BLOCK_P
        start = (wide(batch) * outer + first) * row_bytes + channel // 8
        lanes = c[:, None] + p[None, :] * row_bytes
        exists = (channel + 8 * c < channels)[:, None] & (first + p < outer)[None, :]
    else:
        eight = tl.reshape(bits.to(tl.int32), (BLOCK_C, BLOCK_P // 8, 8))
        value = tl.sum(eight * weights[None, None, :], 2)
        c = tl.arange(0, BLOCK_C)
        p = tl.arange(0, BLOCK_P // 8)
        row = block // row_blocks
        first = (block - row * row_blocks) * BLOCK_P
        line = (wide(batch) * outer + row) * channels + channel
        start = line * row_bytes + first // 8
        lanes = c[:, None] * row_bytes + p[None, :]
        exists = (channel + c < channels)[:, None] & (first + 8 * p < pitch)[None, :]
    tl.store(bits_ptr + start + lanes, value.to(tl.uint8), mask=exists)


@triton.jit
def unpack_bits(
    bits_ptr,
    exists,
    batch,
    channel,
    block,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """The bits of a tile as they were saved."""
    row_bytes = tl.cdiv(pitch, 8)
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    if BY_COLUMN:
        start = (wide(batch) * outer + wide(block) * BLOCK_P) * row_bytes
        start += channel // 8
        lanes = (c // 8)[:, None] + p[None, :] * row_bytes
        shift = (c % 8)[:, None] + tl.zeros((1, BLOCK_P), tl.int32)
    else:
        row = block // row_blocks
        first = (block - row * row_blocks) * BLOCK_P
        line = (wide(batch) * outer + row) * channels + channel
        start = line * row_bytes + first // 8
        lanes = c[:, None] * row_bytes + (p // 8)[None, :]
        shift = tl.zeros((BLOCK_C, 1), tl.int32) + (p % 8)[None, :]
    byte = tl.load(bits_ptr + start + lanes, mask=exists, other=0).to(tl.int32)
    return ((byte >> shift) & 1) != 0


@triton.jit
def passes(z, ACT: tl.constexpr):
    """Where the derivative of relu (1), relu6 (2) or leaky_relu (3) is 1."""
    if ACT == 2:
        through = (z > 0) & (z < 6)
    else:
        through = z > 0
    return through


@triton.jit
def apply_tiles(
    output_ptr,  # (batch, outer, channels, inner), as x and the residual
    bits_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,  # (batch, positions)
    unit,
    high,
    low,
    scale,
    shift,
    batch,
    channel,
    start,
    stop,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
):
    """The output's tiles from stop down to start: the last that were read are still in cache."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    for step in range(stop - start):
        block = stop - 1 - step
        begin, lanes, exists, position = tile_at(
            batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        x = tl.load(x_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
        # The product with a power of two is exact: one rounding, that of the difference.
        d = tl.fma(x, unit[:, None], -high[:, None]) - low[:, None]
        z = d * scale[:, None] + shift[:, None]
        if residual_ptr is not None:
            z += tl.load(residual_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
        y = activate(z, ACT_PARAM, ACT)
        if mask_ptr is not None:
            y = tl.where(kept, y, 0.0)
        tl.store(output_ptr + begin + lanes, y.to(output_ptr.dtype.element_ty), mask=exists)
        if bits_ptr is not None:
            pack_bits(
                bits_ptr, passes(z, ACT) & kept, batch, channel, block, outer, channels, pitch,
                row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN,
            )  # fmt: skip


@triton.jit
def channel_apply_kernel(
    output_ptr,  # (batch, outer, channels, inner), as x and the residual
    bits_ptr,  # (rows, bytes a row) or None
    stats_ptr,  # (3, channels) float64 to copy the buffers to, or None
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # (batch, positions) or None
    weight_ptr,  # (period,) or None
    bias_ptr,  # likewise
    mean_ptr,  # (batch, groups) of any dtype, as var
    var_ptr,
    count_ptr,  # (batch, groups) float64
    groups,
    period,  # channels may be those of several samples: their parameters repeat
    outer,
    channels,
    pitch_units,
    row_blocks,
    blocks,
    splits,
    EPS: tl.constexpr,
    CORRECTION: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The output of a split's share of its channels."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    batch, channel, split = program_of(splits, channels, BLOCK_C)
    start, stop = range_of(split, splits, blocks)
    c = channel + tl.arange(0, BLOCK_C)
    exists = c < channels
    mean, var = statistics_of(
        mean_ptr, var_ptr, count_ptr, batch, c, exists, channels, groups, CORRECTION
    )
    if stats_ptr is not None:
        mine = exists & (split == 0)
        tl.store(stats_ptr + c, mean, mask=mine)
        tl.store(stats_ptr + channels + c, var, mask=mine)
        tl.store(stats_ptr + 2 * channels + c, tl.zeros((BLOCK_C,), tl.float64), mask=mine)
    unit, high, low, rstd = scaled(mean, var, EPS, NARROW)
    weight = parameter(weight_ptr, c % period, exists, 1.0, NARROW)
    bias = parameter(bias_ptr, c % period, exists, 0.0, NARROW)
    apply_tiles(
        output_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit, high, low, weight * rstd, bias,
        batch, channel, start, stop, outer, channels, pitch_units * UNIT, row_blocks, BLOCK_C,
        BLOCK_P, BY_COLUMN, ACT, ACT_PARAM,
    )  # fmt: skip

"""Mean and variance of every channel: partial results of the splits, then their merge.

In float32, as differences from a value near the mean of a few tiles at a time; what these give is
merged in float64. Sums that float32 cannot hold are taken again in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import (
    accumulator,
    kept_lanes,
    positions_before,
    program_of,
    range_of,
    tile_at,
    wide,
)


@triton.jit
def _near_mean(x, kept):
    """A value near the mean of each channel of a tile; equal values give exactly that value."""
    top = tl.max(tl.where(kept, x, float("-inf")), 1)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    distance = tl.sum(tl.where(kept, x - top[:, None], 0.0), 1)
    near = top + distance / tl.maximum(tl.sum(kept.to(tl.int32), 1), 1)
    return tl.where(tl.abs(near) < float("inf"), near, top)


@triton.jit
def _sums(
    x_ptr,
    mask_ptr,
    near,
    batch,
    channel,
    first,
    last,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Σ d and Σ d² of d = x - near in a few tiles, and the number of values a channel."""
    NARROW: tl.constexpr = near.dtype
    sums = tl.zeros((BLOCK_C, BLOCK_P), NARROW)
    squares = tl.zeros((BLOCK_C, BLOCK_P), NARROW)
    count = tl.zeros((BLOCK_C,), tl.float64)
    for block in range(first, last):
        begin, lanes, exists, position = tile_at(
            batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        x = tl.load(x_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
        d = tl.where(kept, x - near[:, None], 0.0)
        sums += d
        squares += d * d
        if mask_ptr is not None:
            count += tl.sum(kept.to(tl.int32), 1)
    if mask_ptr is None:
        count += positions_before(last, outer, pitch, row_blocks, BLOCK_P, BY_COLUMN)
        count -= positions_before(first, outer, pitch, row_blocks, BLOCK_P, BY_COLUMN)
    return tl.sum(sums, 1).to(tl.float64), tl.sum(squares, 1).to(tl.float64), count


@triton.jit
def _wide_sums(
    x_ptr,
    mask_ptr,
    near,
    batch,
    channel,
    first,
    last,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """Σ d and Σ d² in float64, for what float32 does not hold; slower."""
    near = near.to(tl.float64)
    sums = tl.zeros((BLOCK_C,), tl.float64)
    squares = tl.zeros((BLOCK_C,), tl.float64)
    for block in range(first, last):
        begin, lanes, exists, position = tile_at(
            batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        x = tl.load(x_ptr + begin + lanes, mask=exists, other=0.0).to(tl.float64)
        d = tl.where(kept, x - near[:, None], 0.0)
        sums += tl.sum(d, 1)
        squares += tl.sum(d * d, 1)
    return sums, squares


@triton.jit
def moments_of(
    x_ptr,  # (batch, outer, channels, inner)
    mask_ptr,  # (batch, positions) or None
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
    CHUNK: tl.constexpr,
):
    """Mean, sum of squared deviations and number of values in the tiles from start to stop.

    Of BLOCK_C channels, in float64.
    """
    mean = tl.zeros((BLOCK_C,), tl.float64)
    squares = tl.zeros((BLOCK_C,), tl.float64)
    total = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(start, stop, CHUNK):
        last = tl.minimum(first + CHUNK, stop)
        begin, lanes, exists, position = tile_at(
            batch, channel, first, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        x = tl.load(x_ptr + begin + lanes, mask=exists, other=0.0).to(accumulator(x_ptr))
        near = _near_mean(x, kept)
        s, s2, count = _sums(
            x_ptr, mask_ptr, near, batch, channel, first, last, outer, channels, pitch, row_blocks,
            BLOCK_C, BLOCK_P, BY_COLUMN,
        )  # fmt: skip
        # Not finite: a value is not, or the squares are beyond float32. The other channels keep
        # what they have: their bits must not depend on this one.
        finite = s2 < float("inf")
        if tl.min(finite.to(tl.int32), 0) == 0:
            wide_s, wide_s2 = _wide_sums(
                x_ptr, mask_ptr, near, batch, channel, first, last, outer, channels, pitch,
                row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN,
            )  # fmt: skip
            s = tl.where(finite, s, wide_s)
            s2 = tl.where(finite, s2, wide_s2)
        # Chan, Golub & LeVeque 1979.
        safe = tl.maximum(count, 1.0)
        both = tl.maximum(total + count, 1.0)
        shift = tl.where(count > 0, near.to(tl.float64) + s / safe - mean, 0.0)
        own = s2 - s * (s / safe)
        squares += tl.where(own < 0, 0.0, own) + shift * shift * (total * (count / both))
        mean += shift * (count / both)
        total += count
    return mean, squares, total


@triton.jit
def channel_moments_kernel(
    x_ptr,  # (batch, outer, channels, inner)
    mask_ptr,  # (batch, positions) or None
    partials_ptr,  # (3, batch, channels, splits) float64
    batches,
    outer,
    channels,
    pitch_units,
    row_blocks,
    blocks,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean, sum of squared deviations and number of values of a split's share of its channels."""
    batch, channel, split = program_of(splits, channels, BLOCK_C)
    start, stop = range_of(split, splits, blocks)
    mean, squares, total = moments_of(
        x_ptr, mask_ptr, batch, channel, start, stop, outer, channels, pitch_units * UNIT,
        row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN, CHUNK,
    )  # fmt: skip
    c = channel + tl.arange(0, BLOCK_C)
    target = (wide(batch) * channels + c) * splits + split
    size = wide(batches) * channels * splits
    tl.store(partials_ptr + target, mean, mask=c < channels)
    tl.store(partials_ptr + size + target, squares, mask=c < channels)
    tl.store(partials_ptr + 2 * size + target, total, mask=c < channels)


@triton.jit
def merged_moments(
    partials_ptr,  # (3, units, parts) float64: as above, the parts of a unit side by side
    first,
    units,
    parts,
    BLOCK_U: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, at least `parts`
):
    """Mean, sum of squared deviations and number of values of BLOCK_U units, each of its parts.

    In an order that the sizes fix. Parts without values do not count.
    """
    u = first + tl.arange(0, BLOCK_U)
    k = tl.arange(0, PARTS)
    lanes = u.to(tl.int64)[:, None] * parts + k[None, :]
    exists = (u < units)[:, None] & (k < parts)[None, :]
    size = wide(units) * parts
    mean = tl.load(partials_ptr + lanes, mask=exists, other=0.0)
    squares = tl.load(partials_ptr + size + lanes, mask=exists, other=0.0)
    count = tl.load(partials_ptr + 2 * size + lanes, mask=exists, other=0.0)
    total = tl.sum(count, 1)
    safe = tl.maximum(total, 1.0)
    # Relative to one of them, so that the mean of equal values is exactly that value.
    top = tl.max(tl.where(count > 0, mean, float("-inf")), 1)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    distance = tl.where(count > 0, mean - top[:, None], 0.0)
    merged = top + tl.sum(distance * count, 1) / safe
    distance = tl.where(count > 0, mean - merged[:, None], 0.0)
    # A part that is not a number stays one: where() above let it through, as count > 0.
    return merged, tl.sum(squares + distance * distance * count, 1), total

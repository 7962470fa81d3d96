"""The gradients of every channel: the two sums that they need, then the input's.

g     = grad_output · act'(z)          z recomputed from x, or a saved bit
sums  : Σ g  and  Σ g·x̂                of a channel, partial results of the splits
input : rstd · (weight·g - A - x̂·B)    A and B from the sums, of a group; 0 in evaluation
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import slope
from .channel_apply import parameter, scaled, statistics_of, unpack_bits
from .channel_tiles import accumulator, kept_lanes, program_of, range_of, tile_at, wide


@triton.jit
def gradient_of(
    grad_ptr,  # (batch, outer, channels, inner), as x and the residual
    bits_ptr,  # (rows, bytes a row) or None
    x_ptr,
    residual_ptr,  # or None
    unit,
    high,
    low,
    scale,
    shift,
    begin,
    lanes,
    kept,
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
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
):
    """A tile's g and d = x·unit - high - low, both 0 where nothing is kept."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    x = tl.load(x_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
    g = tl.load(grad_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
    d = tl.fma(x, unit[:, None], -high[:, None]) - low[:, None]
    if ACT != 0:
        if bits_ptr is not None:
            through = unpack_bits(
                bits_ptr, exists, batch, channel, block, outer, channels, pitch, row_blocks,
                BLOCK_C, BLOCK_P, BY_COLUMN,
            )  # fmt: skip
            g = tl.where(through, g, g * ACT_PARAM)
        else:
            z = d * scale[:, None] + shift[:, None]
            if residual_ptr is not None:
                z += tl.load(residual_ptr + begin + lanes, mask=exists, other=0.0).to(NARROW)
            s = slope(z, ACT_PARAM, ACT)
            # A derivative of 0 stops an infinite gradient, too.
            g = tl.where(s == 0, 0.0, g * s)
    return tl.where(kept, g, 0.0), tl.where(kept, d, 0.0)


@triton.jit
def gradient_sums_of(
    grad_ptr,
    bits_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
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
    """Σ g and Σ g·d over the tiles from start to stop, in float64 once the lanes are added up."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    sums = tl.zeros((BLOCK_C, BLOCK_P), NARROW)
    products = tl.zeros((BLOCK_C, BLOCK_P), NARROW)
    for block in range(start, stop):
        begin, lanes, exists, position = tile_at(
            batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        g, d = gradient_of(
            grad_ptr, bits_ptr, x_ptr, residual_ptr, unit, high, low, scale, shift, begin, lanes,
            kept, exists, batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C,
            BLOCK_P, BY_COLUMN, ACT, ACT_PARAM,
        )  # fmt: skip
        sums += g
        products += g * d
    return tl.sum(sums, 1).to(tl.float64), tl.sum(products, 1).to(tl.float64)


@triton.jit
def channel_gradient_sums_kernel(
    partials_ptr,  # (2, batch, channels, splits) float64
    grad_ptr,  # (batch, outer, channels, inner), as x and the residual
    bits_ptr,  # (rows, bytes a row) or None
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # (batch, positions) or None
    weight_ptr,  # (period,) or None
    bias_ptr,  # likewise
    stats_ptr,  # (3, batch, groups) float64
    batches,
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
    """Σ g and Σ g·x̂ of a split's share of its channels."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    batch, channel, split = program_of(splits, channels, BLOCK_C)
    start, stop = range_of(split, splits, blocks)
    c = channel + tl.arange(0, BLOCK_C)
    exists = c < channels
    size = wide(batches) * groups
    mean, var = statistics_of(
        stats_ptr, stats_ptr + size, stats_ptr + 2 * size, batch, c, exists, channels, groups,
        CORRECTION,
    )  # fmt: skip
    unit, high, low, rstd = scaled(mean, var, EPS, NARROW)
    weight = parameter(weight_ptr, c % period, exists, 1.0, NARROW)
    bias = parameter(bias_ptr, c % period, exists, 0.0, NARROW)
    s, p = gradient_sums_of(
        grad_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit, high, low, weight * rstd, bias,
        batch, channel, start, stop, outer, channels, pitch_units * UNIT, row_blocks, BLOCK_C,
        BLOCK_P, BY_COLUMN, ACT, ACT_PARAM,
    )  # fmt: skip
    target = (wide(batch) * channels + c) * splits + split
    tl.store(partials_ptr + target, s, mask=exists)
    tl.store(
        partials_ptr + wide(batches) * channels * splits + target,
        p * rstd.to(tl.float64),
        mask=exists,
    )


@triton.jit
def gradient_tiles(
    grad_input_ptr,  # (batch, outer, channels, inner), as all tensors of that size; or None
    grad_residual_ptr,  # or None
    grad_ptr,
    bits_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    unit,
    high,
    low,
    rstd,
    weight,
    bias,
    mean_of_g,
    mean_of_product,
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
    """The input's gradient in the tiles from stop down to start: the last read are still in cache.

    mean_of_g and mean_of_product are the A and B of the formula above.
    """
    # unit = 2^k ≈ rstd: what is multiplied with d is of the size of B, the whole of that of rstd.
    scale = weight * rstd
    b = rstd * mean_of_product
    outer_scale = unit * rstd
    for step in range(stop - start):
        block = stop - 1 - step
        begin, lanes, exists, position = tile_at(
            batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
        )
        kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
        g, d = gradient_of(
            grad_ptr, bits_ptr, x_ptr, residual_ptr, unit, high, low, scale, bias, begin, lanes,
            kept, exists, batch, channel, block, outer, channels, pitch, row_blocks, BLOCK_C,
            BLOCK_P, BY_COLUMN, ACT, ACT_PARAM,
        )  # fmt: skip
        if grad_residual_ptr is not None:
            to = grad_residual_ptr.dtype.element_ty
            tl.store(grad_residual_ptr + begin + lanes, g.to(to), mask=exists)
        if grad_input_ptr is not None:
            inner_terms = weight[:, None] * g - mean_of_g[:, None] - d * b[:, None]
            dx = tl.where(kept, outer_scale[:, None] * inner_terms, 0.0)
            to = grad_input_ptr.dtype.element_ty
            tl.store(grad_input_ptr + begin + lanes, dx.to(to), mask=exists)


@triton.jit
def channel_gradient_kernel(
    grad_input_ptr,  # (batch, outer, channels, inner), as all tensors of that size; or None
    grad_residual_ptr,  # or None
    grad_ptr,
    bits_ptr,  # (rows, bytes a row) or None
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # (batch, positions) or None
    weight_ptr,  # (period,) or None
    bias_ptr,  # likewise
    stats_ptr,  # (3, batch, groups) float64
    means_ptr,  # (2, batch, groups) float64: A and B; None in evaluation
    batches,
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
    """The gradients by the input and the residual of a split's share of its channels."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    batch, channel, split = program_of(splits, channels, BLOCK_C)
    start, stop = range_of(split, splits, blocks)
    c = channel + tl.arange(0, BLOCK_C)
    exists = c < channels
    size = wide(batches) * groups
    mean, var = statistics_of(
        stats_ptr, stats_ptr + size, stats_ptr + 2 * size, batch, c, exists, channels, groups,
        CORRECTION,
    )  # fmt: skip
    unit, high, low, rstd = scaled(mean, var, EPS, NARROW)
    weight = parameter(weight_ptr, c % period, exists, 1.0, NARROW)
    bias = parameter(bias_ptr, c % period, exists, 0.0, NARROW)
    mean_of_g = tl.zeros((BLOCK_C,), NARROW)
    mean_of_product = tl.zeros((BLOCK_C,), NARROW)
    if means_ptr is not None:
        at = wide(batch) * groups + c // (channels // groups)
        mean_of_g = tl.load(means_ptr + at, mask=exists, other=0.0).to(NARROW)
        mean_of_product = tl.load(means_ptr + size + at, mask=exists, other=0.0).to(NARROW)
    gradient_tiles(
        grad_input_ptr, grad_residual_ptr, grad_ptr, bits_ptr, x_ptr, residual_ptr, mask_ptr, unit,
        high, low, rstd, weight, bias, mean_of_g, mean_of_product, batch, channel, start, stop,
        outer, channels, pitch_units * UNIT, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN, ACT,
        ACT_PARAM,
    )  # fmt: skip

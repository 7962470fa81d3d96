"""The gradient kernels of layer norm and RMS norm.

    dx = rstd·(wg - mean(wg) - x̂·mean(wg·x̂)),  g = dy·act'(z),  wg = weight·g

RMS norm has no first mean. The gradients of weight and bias are the sums of g·x̂ and g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import slope
from .channel_tiles import accumulator, wide
from .row_norm import (
    affine_of,
    inverse_of,
    is_scaled,
    load_kept,
    load_stats,
    normalized_by,
    parameter_at,
    weight_at,
)
from .row_tiles import positions_at, samples_at, samples_kept, sizes_of


@triton.jit
def load_tile(
    x_ptr,
    dy_ptr,
    at,
    lanes,
    exists,
    kept,
    unit,
    high,
    scale,
    low,
    weight,
    bias,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDES: tl.constexpr,
):
    """x̂ and g of a tile; 0 of what is hidden or does not exist."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    x = load_kept(x_ptr + at + lanes, exists, kept, COLUMNS, HIDES).to(NARROW)
    g = load_kept(dy_ptr + at + lanes, exists, kept, COLUMNS, HIDES).to(NARROW)
    normalized = normalized_by(x, unit, high, scale, low, CENTRED)
    if CENTRED and not EVEN:
        normalized = tl.where(exists, normalized, 0.0)
    if ACT != 0:
        g *= slope(normalized * weight + bias, ACT_PARAM, ACT)
        g = tl.where(kept, g, 0.0)
    return normalized, g


@triton.jit
def input_gradient(
    dsum_ptr,
    at,
    lanes,
    exists,
    kept,
    normalized,
    wg,
    mean1,
    mean2,
    unit,
    scale,
    CENTRED: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDES: tl.constexpr,
):
    if CENTRED:
        wg -= mean1[:, None]
    dx = wg - normalized * mean2[:, None]
    # Each factor alone: rstd may be out of float32's range where the result is not.
    dx = dx * scale[:, None] * unit[:, None]
    if dsum_ptr is not None:
        dx += load_kept(dsum_ptr + at + lanes, exists, kept, COLUMNS, HIDES).to(dx.dtype)
    return dx


@triton.jit
def store_sums(ptr, sums, part, p, n, inside):
    """The sum of a tile's samples as a row of the partial results, or as the result."""
    target = ptr + wide(part) * n + p
    tl.store(target, tl.sum(sums, 0).to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("outer", "n", "inner", "each"))
def row_norm_backward_kernel(
    dx_ptr,  # (outer, n, inner), as x, dy and dsum; or None
    dweight_ptr,  # (programs, n) or None
    dbias_ptr,  # likewise
    dy_ptr,
    dsum_ptr,  # or None
    x_ptr,
    weight_ptr,  # (n,) or None
    bias_ptr,  # likewise
    kept_ptr,  # (samples,) or None
    stats_ptr,  # (2, samples) or (samples,) float64
    outer,
    n,
    inner,
    each,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Samples that fit the registers, `each` tiles one after the other."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    SCALED: tl.constexpr = is_scaled(x_ptr)
    HIDES: tl.constexpr = kept_ptr is not None
    n, inner = sizes_of(n, inner, UNIT, COLUMNS)
    inverse = inverse_of(n, NARROW)
    p, inside = positions_at(0, n, BLOCK_N, EVEN)
    weight = weight_at(weight_ptr, p, inside, NARROW, PLUS_ONE, ROWS)
    bias = parameter_at(bias_ptr, p, inside, 0.0, NARROW, ROWS)
    dweight = tl.zeros((ROWS, BLOCK_N), NARROW)
    dbias = tl.zeros((ROWS, BLOCK_N), NARROW)
    program = tl.program_id(0)
    for tile in tl.range(program * each, program * each + each, num_stages=STAGES):
        first, at, r, exists = samples_at(tile, outer, n, inner, ROWS, COLUMNS)
        kept = samples_kept(kept_ptr, first, exists, ROWS)
        lanes = r[:, None] + (p * inner)[None, :]
        written = exists[:, None] & inside[None, :]
        there = kept[:, None] & inside[None, :]
        mean, rstd = load_stats(stats_ptr, first, exists, wide(outer) * inner, ROWS, CENTRED)
        unit, high, scale, low = affine_of(mean, rstd, NARROW, SCALED, CENTRED)
        normalized, g = load_tile(
            x_ptr, dy_ptr, at, lanes, written, there, unit, high, scale, low, weight, bias,
            CENTRED, ACT, ACT_PARAM, EVEN, COLUMNS, HIDES,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += g * normalized
        if dbias_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            wg = g * weight
            mean1 = tl.sum(wg, 1) * inverse if CENTRED else scale
            mean2 = tl.sum(wg * normalized, 1) * inverse
            dx = input_gradient(
                dsum_ptr, at, lanes, written, there, normalized, wg, mean1, mean2, unit, scale,
                CENTRED, COLUMNS, HIDES,
            )  # fmt: skip
            tl.store(dx_ptr + at + lanes, dx.to(dx_ptr.dtype.element_ty), mask=written)
    if dweight_ptr is not None:
        store_sums(dweight_ptr, dweight, program, p, n, inside)
    if dbias_ptr is not None:
        store_sums(dbias_ptr, dbias, program, p, n, inside)


@triton.jit(do_not_specialize=("outer", "n", "inner"))
def row_norm_means_kernel(
    means_ptr,  # (2, samples): of wg and of wg·x̂
    dy_ptr,  # (outer, n, inner), as x
    x_ptr,
    weight_ptr,  # (n,) or None
    bias_ptr,  # likewise
    kept_ptr,  # (samples,) or None
    stats_ptr,  # (2, samples) or (samples,) float64
    outer,
    n,
    inner,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The two means of longer samples."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    SCALED: tl.constexpr = is_scaled(x_ptr)
    HIDES: tl.constexpr = kept_ptr is not None
    n, inner = sizes_of(n, inner, UNIT, COLUMNS)
    first, offset, r, exists = samples_at(tl.program_id(0), outer, n, inner, ROWS, COLUMNS)
    samples = wide(outer) * inner
    kept = samples_kept(kept_ptr, first, exists, ROWS)
    mean, rstd = load_stats(stats_ptr, first, exists, samples, ROWS, CENTRED)
    unit, high, scale, low = affine_of(mean, rstd, NARROW, SCALED, CENTRED)
    sum1 = tl.zeros((ROWS,), tl.float64)
    sum2 = tl.zeros((ROWS,), tl.float64)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        p, inside = positions_at(start, n, BLOCK_N, EVEN)
        weight = weight_at(weight_ptr, start + p, inside, NARROW, PLUS_ONE, ROWS)
        bias = parameter_at(bias_ptr, start + p, inside, 0.0, NARROW, ROWS)
        lanes = r[:, None] + (p * inner)[None, :]
        at = offset + wide(start) * inner
        written = exists[:, None] & inside[None, :]
        there = kept[:, None] & inside[None, :]
        normalized, g = load_tile(
            x_ptr, dy_ptr, at, lanes, written, there, unit, high, scale, low, weight, bias,
            CENTRED, ACT, ACT_PARAM, EVEN, COLUMNS, HIDES,
        )  # fmt: skip
        wg = g * weight
        if CENTRED:
            sum1 += tl.sum(wg, 1)
        sum2 += tl.sum(wg * normalized, 1)
    at = means_ptr + first + tl.arange(0, ROWS)
    tl.store(at, (sum1 / n).to(NARROW), mask=exists)
    tl.store(at + samples, (sum2 / n).to(NARROW), mask=exists)


@triton.jit(do_not_specialize=("outer", "n", "inner", "each"))
def row_norm_backward_long_kernel(
    dx_ptr,  # (outer, n, inner), as x, dy and dsum; or None
    dweight_ptr,  # (programs, n) or None
    dbias_ptr,  # likewise
    means_ptr,  # (2, samples), or None without dx
    dy_ptr,
    dsum_ptr,  # or None
    x_ptr,
    weight_ptr,  # (n,) or None
    bias_ptr,  # likewise
    kept_ptr,  # (samples,) or None
    stats_ptr,  # (2, samples) or (samples,) float64
    outer,
    n,
    inner,
    each,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of longer samples, whose means are known: no sum crosses a program."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    SCALED: tl.constexpr = is_scaled(x_ptr)
    HIDES: tl.constexpr = kept_ptr is not None
    n, inner = sizes_of(n, inner, UNIT, COLUMNS)
    blocks = tl.cdiv(n, BLOCK_N)
    part = tl.program_id(0) // blocks
    start = (tl.program_id(0) - part * blocks) * BLOCK_N
    samples = wide(outer) * inner
    p, inside = positions_at(start, n, BLOCK_N, EVEN)
    weight = weight_at(weight_ptr, start + p, inside, NARROW, PLUS_ONE, ROWS)
    bias = parameter_at(bias_ptr, start + p, inside, 0.0, NARROW, ROWS)
    dweight = tl.zeros((ROWS, BLOCK_N), NARROW)
    dbias = tl.zeros((ROWS, BLOCK_N), NARROW)
    for tile in tl.range(part * each, part * each + each, num_stages=STAGES):
        first, at, r, exists = samples_at(tile, outer, n, inner, ROWS, COLUMNS)
        kept = samples_kept(kept_ptr, first, exists, ROWS)
        at += wide(start) * inner
        lanes = r[:, None] + (p * inner)[None, :]
        written = exists[:, None] & inside[None, :]
        there = kept[:, None] & inside[None, :]
        mean, rstd = load_stats(stats_ptr, first, exists, samples, ROWS, CENTRED)
        unit, high, scale, low = affine_of(mean, rstd, NARROW, SCALED, CENTRED)
        normalized, g = load_tile(
            x_ptr, dy_ptr, at, lanes, written, there, unit, high, scale, low, weight, bias,
            CENTRED, ACT, ACT_PARAM, EVEN, COLUMNS, HIDES,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += g * normalized
        if dbias_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            here = means_ptr + first + tl.arange(0, ROWS)
            mean1 = tl.load(here, mask=exists, other=0.0)
            mean2 = tl.load(here + samples, mask=exists, other=0.0)
            dx = input_gradient(
                dsum_ptr, at, lanes, written, there, normalized, g * weight, mean1, mean2, unit,
                scale, CENTRED, COLUMNS, HIDES,
            )  # fmt: skip
            tl.store(dx_ptr + at + lanes, dx.to(dx_ptr.dtype.element_ty), mask=written)
    if dweight_ptr is not None:
        store_sums(dweight_ptr, dweight, part, start + p, n, inside)
    if dbias_ptr is not None:
        store_sums(dbias_ptr, dbias, part, start + p, n, inside)

"""What the kernels of layer norm and RMS norm have in common: a sample's statistics, and x̂.

Arithmetic is float32, of float64 inputs float64. A sample is first multiplied by `unit`, a power of
two that brings its values near 1: this is exact, and no square leaves the range of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import accumulator


@triton.jit
def load_kept(ptr, exists, kept, COLUMNS: tl.constexpr, HIDES: tl.constexpr):
    """What exists and is kept, else 0."""
    if COLUMNS and HIDES:
        # Neighbours in memory are of other samples: a hidden one must not split a load.
        x = tl.where(kept, tl.load(ptr, mask=exists, other=0.0), 0.0)
    else:
        x = tl.load(ptr, mask=kept, other=0.0)
    return x


@triton.jit
def load_samples(
    x_ptr,
    residual_ptr,
    start,
    lanes,
    exists,
    kept,
    COLUMNS: tl.constexpr,
    HIDES: tl.constexpr,
):
    """x, or the sum with the residual rounded to its dtype as torch rounds it; 0 where hidden."""
    x = load_kept(x_ptr + start + lanes, exists, kept, COLUMNS, HIDES)
    if residual_ptr is not None:
        NARROW: tl.constexpr = accumulator(x_ptr)
        residual = load_kept(residual_ptr + start + lanes, exists, kept, COLUMNS, HIDES)
        x = (x.to(NARROW) + residual.to(NARROW)).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def is_scaled(x_ptr):
    """Whether a float32 square may leave the range: float16's do not, and float64 is left as is."""
    return x_ptr.dtype.element_ty == tl.float32 or x_ptr.dtype.element_ty == tl.bfloat16


@triton.jit
def exponent_of(x):
    """The bits of a float32 number without sign and mantissa: where x is normal, a power of two."""
    return x.to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def power_and_inverse(exponent):
    """2^e and 2^-e from the bits of the first, within the normal numbers."""
    bits = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def unit_of(x, EPS: tl.constexpr, SCALED: tl.constexpr):
    """`unit` of each sample, and its inverse.

    The largest |x|·unit is in [1, 2), or smaller where unit²·eps would overflow: eps is so much
    larger there than any square that these do not count.
    """
    if SCALED:
        # Integers order as the numbers do, and a NaN hides nothing.
        largest = tl.max(exponent_of(x), 1)
        eps = exponent_of(tl.full((), EPS, tl.float32)) >> 23
        size, unit = power_and_inverse(tl.maximum(largest, (4 + eps // 2) << 23))
    else:
        unit = tl.full((x.shape[0],), 1.0, x.dtype)
        size = unit
    return unit, size


@triton.jit
def inverse_of(count, NARROW: tl.constexpr):
    """1/count of an integer."""
    count = tl.full((), count, NARROW)
    if NARROW == tl.float64:
        inverse = 1.0 / count
    else:
        inverse = tl.div_rn(tl.full((), 1.0, NARROW), count)
    return inverse


@triton.jit
def moments_of(x, first, unit, inside, inverse, EVEN: tl.constexpr):
    """Of each sample times unit: x - high, high, low and the variance; the mean is high + low.

    The first shift is a value of the sample, so that equal values leave exactly 0.
    """
    high = first * unit
    d = x * unit[:, None] - high[:, None]
    if not EVEN:
        d = tl.where(inside[None, :], d, 0.0)
    high += tl.sum(d, 1) * inverse
    d = x * unit[:, None] - high[:, None]
    if not EVEN:
        d = tl.where(inside[None, :], d, 0.0)
    low = tl.sum(d, 1) * inverse
    # Differences from high, which is within some roundings of the mean: nothing cancels.
    return d, high, low, tl.sum(d * d, 1) * inverse - low * low


@triton.jit
def rstd_of(var, unit, EPS: tl.constexpr):
    """1/√(var + eps), over unit, from a variance times unit²."""
    v = var + EPS * unit * unit
    if var.dtype == tl.float64:
        r = 1.0 / tl.sqrt(v)
    else:
        if EPS > 0:
            # Where eps·unit² underflows, the variance is far above, or 0 as x - mean is then.
            v = tl.where(v < 1.1754943508222875e-38, 1.1754943508222875e-38, v)
        r = tl.rsqrt(v)
        # A step of Newton's: the hardware's result is up to two units off.
        r += (0.5 * r) * tl.fma(-(v * r), r, 1.0)
    return r


@triton.jit
def load_stats(
    stats_ptr,  # (2, samples) mean and rstd, or (samples,) rstd alone; float64
    first,
    exists,
    samples,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Mean and rstd of a tile's samples."""
    at = stats_ptr + first + tl.arange(0, ROWS)
    if CENTRED:
        mean = tl.load(at, mask=exists, other=0.0)
        rstd = tl.load(at + samples, mask=exists, other=0.0)
    else:
        mean = tl.zeros((ROWS,), tl.float64)
        rstd = tl.load(at, mask=exists, other=0.0)
    return mean, rstd


@triton.jit
def save_stats(
    stats_ptr, first, exists, kept, samples, mean, rstd, ROWS: tl.constexpr, CENTRED: tl.constexpr
):
    """The same the other way; 0 of hidden samples."""
    at = stats_ptr + first + tl.arange(0, ROWS)
    if CENTRED:
        tl.store(at, tl.where(kept, mean, 0.0), mask=exists)
        at += samples
    tl.store(at, tl.where(kept, rstd, 0.0), mask=exists)


@triton.jit
def affine_of(mean, rstd, NARROW: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr):
    """What x̂ is computed from: x̂ = (x·unit - high)·scale + offset.

    Near 1/√(var + eps), `unit` keeps the difference and its product in the range of float32; not
    so large, though, that mean·unit leaves it: so far from 0 values are equal or far apart.
    """
    if SCALED:
        exponent = exponent_of(rstd.to(tl.float32))
        if CENTRED:
            above_one = tl.maximum(exponent_of(mean.to(tl.float32)) - 0x3F800000, 0)
            exponent = tl.minimum(exponent, 0x71800000 - above_one)  # 2^100
        unit, size = power_and_inverse(exponent)
        scale = (rstd * size.to(tl.float64)).to(tl.float32)
    else:
        unit = tl.full(rstd.shape, 1.0, NARROW)
        scale = rstd.to(NARROW)
    if CENTRED:
        mean = mean * unit.to(tl.float64)
        high = mean.to(NARROW)
        offset = -((mean - high.to(tl.float64)).to(NARROW) * scale)
    else:
        high = tl.zeros(rstd.shape, NARROW)
        offset = high
    return unit, high, scale, offset


@triton.jit
def normalized_by(x, unit, high, scale, offset, CENTRED: tl.constexpr):
    """x̂. The product with a power of two is exact: one rounding, that of the difference."""
    x = x * unit[:, None]
    if CENTRED:
        normalized = (x - high[:, None]) * scale[:, None] + offset[:, None]
    else:
        normalized = x * scale[:, None]
    return normalized


@triton.jit
def parameter_at(ptr, p, inside, default, NARROW: tl.constexpr, ROWS: tl.constexpr):
    """A parameter of positions p beside the samples; where there is none, its neutral value."""
    if ptr is None:
        value = tl.full((1, p.shape[0]), default, NARROW)
    elif ROWS == 1:
        # Of the shape that x has, and so in its layout.
        value = tl.load(ptr + p[None, :], mask=inside[None, :], other=0.0).to(NARROW)
    else:
        value = tl.load(ptr + p, mask=inside, other=0.0).to(NARROW)[None, :]
    return value


@triton.jit
def weight_at(
    weight_ptr, p, inside, NARROW: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr
):
    """The weight as it multiplies."""
    weight = parameter_at(weight_ptr, p, inside, 1.0, NARROW, ROWS)
    if PLUS_ONE and weight_ptr is not None:
        weight += 1.0
    return weight

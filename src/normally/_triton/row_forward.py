"""The forward of layer norm and RMS norm: one launch, a tile of samples a program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .channel_tiles import accumulator, wide
from .row_norm import (
    affine_of,
    inverse_of,
    is_scaled,
    load_samples,
    moments_of,
    normalized_by,
    parameter_at,
    rstd_of,
    save_stats,
    unit_of,
    weight_at,
)
from .row_tiles import (
    Settings,
    kept_samples,
    like_rows,
    operand,
    positions_at,
    samples_at,
    samples_kept,
    samples_of,
    sizes_of,
    stages_of,
    tile_of,
)


@triton.jit
def _finish(
    normalized,
    weight,
    bias,
    kept,
    y_ptr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    LLAMA: tl.constexpr,
    HIDES: tl.constexpr,
):
    """The output from x̂, rounded."""
    if LLAMA:
        normalized = normalized.to(y_ptr.dtype.element_ty).to(normalized.dtype)
    y = activate(normalized * weight + bias, ACT_PARAM, ACT)
    if HIDES:
        y = tl.where(kept[:, None], y, 0.0)
    return y.to(y_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=("outer", "n", "inner"))
def row_norm_forward_kernel(
    y_ptr,  # (outer, n, inner), as x, the residual and the sum
    sum_ptr,  # or None
    stats_ptr,  # (2, samples) or (samples,) float64
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (n,) or None
    bias_ptr,  # likewise
    kept_ptr,  # (samples,) or None
    outer,
    n,
    inner,
    CENTRED: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    LLAMA: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Samples that fit the registers: x is read once."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    SCALED: tl.constexpr = is_scaled(x_ptr)
    HIDES: tl.constexpr = kept_ptr is not None
    n, inner = sizes_of(n, inner, UNIT, COLUMNS)
    first, offset, r, exists = samples_at(tl.program_id(0), outer, n, inner, ROWS, COLUMNS)
    kept = samples_kept(kept_ptr, first, exists, ROWS)
    p, inside = positions_at(0, n, BLOCK_N, EVEN)
    lanes = r[:, None] + (p * inner)[None, :]

    written = exists[:, None] & inside[None, :]
    there = kept[:, None] & inside[None, :]
    x = load_samples(x_ptr, residual_ptr, offset, lanes, written, there, COLUMNS, HIDES)
    if residual_ptr is not None:
        tl.store(sum_ptr + offset + lanes, x, mask=written)
    x = x.to(NARROW)
    unit, size = unit_of(x, EPS, SCALED)
    inverse = inverse_of(n, NARROW)
    if CENTRED:
        one = load_samples(x_ptr, residual_ptr, offset, r, exists, kept, COLUMNS, HIDES)
        d, high, low, var = moments_of(x, one.to(NARROW), unit, inside, inverse, EVEN)
        rstd = rstd_of(var, unit, EPS)
        normalized = d * rstd[:, None] - (low * rstd)[:, None]
        mean = (high.to(tl.float64) + low.to(tl.float64)) * size.to(tl.float64)
    else:
        x = x * unit[:, None]
        rstd = rstd_of(tl.sum(x * x, 1) * inverse, unit, EPS)
        normalized = x * rstd[:, None]
        mean = rstd  # not read
    rstd = rstd.to(tl.float64) * unit.to(tl.float64)
    save_stats(stats_ptr, first, exists, kept, wide(outer) * inner, mean, rstd, ROWS, CENTRED)

    weight = weight_at(weight_ptr, p, inside, NARROW, PLUS_ONE, ROWS)
    bias = parameter_at(bias_ptr, p, inside, 0.0, NARROW, ROWS)
    y = _finish(normalized, weight, bias, kept, y_ptr, ACT, ACT_PARAM, LLAMA, HIDES)
    tl.store(y_ptr + offset + lanes, y, mask=written)


@triton.jit(do_not_specialize=("outer", "n", "inner"))
def row_norm_forward_long_kernel(
    y_ptr,  # (outer, n, inner), as x, the residual and the sum
    sum_ptr,  # or None
    stats_ptr,  # (2, samples) or (samples,) float64
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (n,) or None
    bias_ptr,  # likewise
    kept_ptr,  # (samples,) or None
    outer,
    n,
    inner,
    CENTRED: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    ACT_PARAM: tl.constexpr,
    LLAMA: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Longer samples, in blocks whose moments are merged in float64; the second read is of L2."""
    NARROW: tl.constexpr = accumulator(x_ptr)
    SCALED: tl.constexpr = is_scaled(x_ptr)
    HIDES: tl.constexpr = kept_ptr is not None
    n, inner = sizes_of(n, inner, UNIT, COLUMNS)
    first, offset, r, exists = samples_at(tl.program_id(0), outer, n, inner, ROWS, COLUMNS)
    kept = samples_kept(kept_ptr, first, exists, ROWS)

    mean = tl.zeros((ROWS,), tl.float64)
    squares = tl.zeros((ROWS,), tl.float64)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        p, inside = positions_at(start, n, BLOCK_N, EVEN)
        lanes = r[:, None] + (p * inner)[None, :]
        at = offset + wide(start) * inner
        written = exists[:, None] & inside[None, :]
        there = kept[:, None] & inside[None, :]
        x = load_samples(x_ptr, residual_ptr, at, lanes, written, there, COLUMNS, HIDES)
        if residual_ptr is not None:
            tl.store(sum_ptr + at + lanes, x, mask=written)
        x = x.to(NARROW)
        unit, size = unit_of(x, EPS, SCALED)
        size = size.to(tl.float64)
        block = tl.minimum(n - start, BLOCK_N)
        if CENTRED:
            one = load_samples(x_ptr, residual_ptr, at, r, exists, kept, COLUMNS, HIDES)
            inverse = inverse_of(block, NARROW)
            _, high, low, var = moments_of(x, one.to(NARROW), unit, inside, inverse, EVEN)
            # Chan, Golub & LeVeque 1979.
            shift = (high.to(tl.float64) + low.to(tl.float64)) * size - mean
            share = block.to(tl.float64) / (start + block).to(tl.float64)
            mean += shift * share
            squares += (var.to(tl.float64) * size * size + shift * shift * (1.0 - share)) * block
        else:
            x = x * unit[:, None]
            squares += tl.sum(x * x, 1).to(tl.float64) * size * size
    rstd = 1.0 / tl.sqrt(squares / n + EPS)
    save_stats(stats_ptr, first, exists, kept, wide(outer) * inner, mean, rstd, ROWS, CENTRED)

    unit, high, scale, low = affine_of(mean, rstd, NARROW, SCALED, CENTRED)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        p, inside = positions_at(start, n, BLOCK_N, EVEN)
        lanes = r[:, None] + (p * inner)[None, :]
        at = offset + wide(start) * inner
        written = exists[:, None] & inside[None, :]
        there = kept[:, None] & inside[None, :]
        x = load_samples(x_ptr, residual_ptr, at, lanes, written, there, COLUMNS, HIDES)
        normalized = normalized_by(x.to(NARROW), unit, high, scale, low, CENTRED)
        weight = weight_at(weight_ptr, start + p, inside, NARROW, PLUS_ONE, ROWS)
        bias = parameter_at(bias_ptr, start + p, inside, 0.0, NARROW, ROWS)
        y = _finish(normalized, weight, bias, kept, y_ptr, ACT, ACT_PARAM, LLAMA, HIDES)
        tl.store(y_ptr + at + lanes, y, mask=written)


def forward(
    output: Tensor,
    total: Tensor,
    stats: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> None:
    """Fill output, sum and statistics of either norm."""
    if input.numel() == 0:
        return
    start, end = settings.start, settings.end
    y, added = output, None if residual is None else total
    samples = samples_of(y, start, end)
    if samples is None:
        y = like_rows(output, start, end)
        added = None if residual is None else like_rows(output, start, end)
        samples = samples_of(y, start, end)
        assert samples is not None
    tile = tile_of("forward", samples.n, samples.inner, output.element_size())
    constants = {
        "CENTRED": settings.centred, "EPS": settings.eps, "ACT": settings.act,
        "ACT_PARAM": settings.act_param, "LLAMA": settings.llama, "PLUS_ONE": settings.plus_one,
        **tile.constants,
    }  # fmt: skip
    if tile.whole:
        kernel = row_norm_forward_kernel
    else:
        kernel = row_norm_forward_long_kernel
        tensors = 1 if residual is None else 2
        constants["STAGES"] = stages_of(tile, input.element_size(), tensors)
    kernel[(tile.number(samples),)](
        y, added, stats, operand(input, y, tile.unit), operand(residual, y, tile.unit),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        kept_samples(mask, y, start, end), *tile.shape(samples), **constants,
    )  # fmt: skip
    if y is not output:
        output.copy_(y)
        if added is not None:
            total.copy_(added)

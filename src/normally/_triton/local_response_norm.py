"""Local response norm on the GPU.

    d_c = k + alpha / size · Σ x²                 over channels c - below … c + above
    y_c = x_c · d_c^-beta
    dx_c = dy_c · d_c^-beta - 2 alpha beta / size · x_c · Σ dy_j x_j d_j^(-beta-1)
                                                  over channels c - above … c + below

A program has a tile of channels and positions; the other channels of a window come from the
caches. Between the backward's two launches the terms of its sum are kept in float64: d can be
as large as the square of the largest float, and they as small as its inverse.

d and its powers are float32 where that serves. A tile with a value for which it does not is
computed in float64 as well, and only such values are taken from there: no result depends on what
lies outside of its window.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Case, case
from .channel_tiles import Tiles, accumulator, dense_like, dense_mask, kept_lanes, tile_at, wide

#: Values of a tile, and bytes of its neighbours in memory where channels are not those.
_TILE, _ROW_BYTES = 1024, 256
#: Squares whose float32 sum keeps its digits; longer windows are float64 throughout.
_SHORT = 16


@triton.jit
def _window_sum(
    ptr, tile, FIRST: tl.constexpr, LAST: tl.constexpr, SQUARED: tl.constexpr, DTYPE: tl.constexpr
):
    """Σ over channels c + FIRST … c + LAST that exist, of squares or of values.

    Anew for every channel: to slide it would lose digits and keep a NaN.
    """
    begin, lanes, c, channels, step, exists, kept = tile
    total = tl.zeros(kept.shape, DTYPE)
    for i in tl.range(LAST + 1 - FIRST, loop_unroll_factor=min(LAST + 1 - FIRST, 8)):
        near = c + (FIRST + i)
        inside = exists & ((near >= 0) & (near < channels))[:, None]
        start = begin + wide(FIRST + i) * step
        # A load under `kept` itself would take one value at a time.
        value = tl.where(kept, tl.load(ptr + start + lanes, mask=inside, other=0.0), 0.0).to(DTYPE)
        total += value * value if SQUARED else value
    return total


@triton.jit
def _power(d, BETA: tl.constexpr, QUARTERS: tl.constexpr):
    """d^-beta. QUARTERS is 4·|beta| where that is a small integer: by square roots, then."""
    if QUARTERS is None:
        p = tl.exp(-BETA * tl.log(d.to(tl.float64))).to(d.dtype)
    else:
        p = tl.full(d.shape, 1.0, d.dtype)
        for _ in tl.static_range(QUARTERS // 4):
            p *= d
        if QUARTERS % 4 >= 2:
            p *= tl.sqrt(d)
        if QUARTERS % 2 == 1:
            p *= tl.sqrt(tl.sqrt(d))
        if BETA > 0:
            p = 1.0 / p
    return p


@triton.jit
def _denominator_and_power(x_ptr, tile, SETTINGS: tl.constexpr, DTYPE: tl.constexpr):
    """The denominator d and d^-beta; 1 where a position is hidden or does not exist."""
    BELOW: tl.constexpr = SETTINGS[0]
    ABOVE: tl.constexpr = SETTINGS[1]
    SCALE: tl.constexpr = SETTINGS[2]
    BETA: tl.constexpr = SETTINGS[3]
    K: tl.constexpr = SETTINGS[4]
    QUARTERS: tl.constexpr = SETTINGS[5]
    total = _window_sum(x_ptr, tile, -BELOW, ABOVE, True, DTYPE)
    d = tl.where(tile[6], total * SCALE + K, 1.0)
    return d, _power(d, BETA, QUARTERS)


@triton.jit
def _powers(x_ptr, tile, SETTINGS: tl.constexpr):
    """d^-beta and d^(-beta-1) of a tile in float64, computed in float32 from LEAST to MOST."""
    LEAST: tl.constexpr = SETTINGS[6]
    MOST: tl.constexpr = SETTINGS[7]
    if LEAST > MOST or accumulator(x_ptr) == tl.float64:
        d, power = _denominator_and_power(x_ptr, tile, SETTINGS, tl.float64)
        slope = power / d
    else:
        d, p = _denominator_and_power(x_ptr, tile, SETTINGS, tl.float32)
        power = p.to(tl.float64)
        slope = (p / d).to(tl.float64)
        serves = (d >= LEAST) & (d <= MOST)
        if tl.min(serves.to(tl.int32)) == 0:
            wide_d, wide_p = _denominator_and_power(x_ptr, tile, SETTINGS, tl.float64)
            power = tl.where(serves, power, wide_p)
            slope = tl.where(serves, slope, wide_p / wide_d)
    return power, slope


@triton.jit
def _tile(
    mask_ptr,
    outer,
    channels,
    pitch,
    row_blocks,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """A program's tile: its offset and that of its lanes, its channels, how many there are at all.

    And the step from a channel to the next, the lanes that exist and those that are kept as well.
    Programs with the same positions follow each other.
    """
    if BY_COLUMN:
        channels = pitch  # the same number, of which a power of two is known
    tiles = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) // tiles
    channel = (tl.program_id(0) % tiles) * BLOCK_C
    begin, lanes, exists, position = tile_at(
        0, channel, block, outer, channels, pitch, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
    )
    kept = kept_lanes(mask_ptr, exists, position, BLOCK_P)
    step = wide(1) if BY_COLUMN else wide(pitch)
    return begin, lanes, channel + tl.arange(0, BLOCK_C), channels, step, exists, kept


@triton.jit
def _load(ptr, tile):
    value = tl.load(ptr + tile[0] + tile[1], mask=tile[5], other=0.0)
    return tl.where(tile[6], value, 0.0).to(tl.float64)


@triton.jit
def _store(ptr, tile, value):
    value = value.to(accumulator(ptr))  # to 16 bits there is only a way from float32
    tl.store(ptr + tile[0] + tile[1], value.to(ptr.dtype.element_ty), mask=tile[5])


@triton.jit
def _local_response_norm_forward_kernel(
    output_ptr,  # (outer, channels, inner), as dy and x
    dy_ptr,  # or None
    x_ptr,
    mask_ptr,  # (positions,) or None
    outer,
    channels,
    pitch_units,
    row_blocks,
    SETTINGS: tl.constexpr,  # below, above, alpha / size, beta, k, quarters, least, most
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """With dy the terms of the gradient's sum: dy · x · d^(-beta-1)."""
    tile = _tile(
        mask_ptr, outer, channels, pitch_units * UNIT, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
    )
    power, slope = _powers(x_ptr, tile, SETTINGS)
    x = _load(x_ptr, tile)
    if dy_ptr is None:
        _store(output_ptr, tile, x * power)
    else:
        _store(output_ptr, tile, _load(dy_ptr, tile) * (x * slope))


@triton.jit
def _local_response_norm_backward_kernel(
    dx_ptr,  # (outer, channels, inner), as dy and x
    slopes_ptr,  # (outer, channels, inner) float64
    dy_ptr,
    x_ptr,
    mask_ptr,  # (positions,) or None
    outer,
    channels,
    pitch_units,
    row_blocks,
    SETTINGS: tl.constexpr,  # as in the forward
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    UNIT: tl.constexpr,
):
    tile = _tile(
        mask_ptr, outer, channels, pitch_units * UNIT, row_blocks, BLOCK_C, BLOCK_P, BY_COLUMN
    )
    power, _ = _powers(x_ptr, tile, SETTINGS)
    total = _window_sum(slopes_ptr, tile, -SETTINGS[1], SETTINGS[0], False, tl.float64)
    x, dy = _load(x_ptr, tile), _load(dy_ptr, tile)
    _store(dx_ptr, tile, dy * power - x * (total * (2 * SETTINGS[3] * SETTINGS[2])))


def _cut(x: Tensor) -> Tiles:
    """Tiles of a dense tensor: of several channels, so that windows overlap within a program."""
    channels, itemsize = x.shape[1], x.element_size()
    inner = x.stride(1) if channels > 1 else x.numel()
    outer = x.numel() // (channels * inner)
    by_column = inner == 1
    if by_column:
        block_c = min(64, triton.next_power_of_2(channels))
        block_p = min(_TILE // block_c, triton.next_power_of_2(outer))
        pitch, row_blocks, blocks = channels, 1, triton.cdiv(outer, block_p)
    else:
        block_p = min(_ROW_BYTES // itemsize, triton.next_power_of_2(inner))
        block_c = min(_TILE // block_p, triton.next_power_of_2(channels))
        while block_c * inner >= 1 << 31:  # a lane's offset has 32 bits
            block_c //= 2
        pitch, row_blocks = inner, triton.cdiv(inner, block_p)
        blocks = outer * row_blocks
    return Tiles(
        1, outer, channels, inner, block_c, block_p, row_blocks, blocks, blocks, by_column,
        unit=min(16, pitch & -pitch), warps=4,
    )  # fmt: skip


def _settings(
    channels: int, size: int, alpha: float, beta: float, k: float
) -> tuple[int | float | None, ...]:
    """What the settings are to the kernels. The limits of d are those of csrc, for both ways."""
    below, above = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    taps, scale = below + 1 + above, alpha / size
    reach = 1e30 ** (1 / max(abs(beta), abs(beta + 1)))
    least, most = max(1e-30, 1e-30 * scale * taps, 1 / reach), min(1e37, reach)
    ordinary = all(v == 0 or 1e-15 < v < 1e15 for v in (scale, k))
    if not ordinary or taps > _SHORT:
        least = math.inf
    quarters = 4 * abs(beta)
    by_roots = quarters.is_integer() and quarters <= 16
    return below, above, scale, beta, k, int(quarters) if by_roots else None, least, most


def _refuse(*absent: Tensor | None) -> None:
    if any(t is not None for t in absent):
        raise ValueError("normally::local_response_norm: has no residual, weight or bias")


def forward(
    output: Tensor,
    total: Tensor,
    stats: Tensor,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> None:
    """`normally::local_response_norm`."""
    _refuse(residual, weight, bias)
    if input.numel() == 0:
        return
    tiles = _cut(output)
    _local_response_norm_forward_kernel[tiles.grid](
        output, None, dense_like(input, output), dense_mask(mask, output), *tiles.shape[:4],
        SETTINGS=_settings(input.shape[1], size, alpha, beta, k), **tiles.constants,
    )  # fmt: skip


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
    size: int,
    alpha: float,
    beta: float,
    k: float,
    need: int,
) -> None:
    """`normally::local_response_norm_backward`."""
    _refuse(grad_sum, weight, bias)
    if grad_input.numel() == 0:
        return
    tiles = _cut(grad_input)
    operands = (
        dense_like(grad_output, grad_input), dense_like(input, grad_input),
        dense_mask(mask, grad_input), *tiles.shape[:4],
    )  # fmt: skip
    constants = {"SETTINGS": _settings(input.shape[1], size, alpha, beta, k), **tiles.constants}
    slopes = torch.empty_like(grad_input, dtype=torch.float64)
    _local_response_norm_forward_kernel[tiles.grid](slopes, *operands, **constants)
    _local_response_norm_backward_kernel[tiles.grid](grad_input, slopes, *operands, **constants)


def compile_cases() -> list[Case]:
    """What `make gpu-compile` compiles: AlexNet's first norm, and all that is rarer."""
    variants = (
        ("planes", "fp32", 1, 5, 0.75, None),
        ("columns", "fp32", 96, 5, 0.75, None),
        ("planes masked", "bf16", 1, 5, 0.75, "*u8"),
        ("any power", "fp32", 1, 5, 0.6, None),
        ("long window", "fp32", 1, 64, 0.75, None),
        ("planes", "fp64", 1, 5, 0.75, None),
    )
    cases = []
    for name, dtype, position, size, beta, mask in variants:
        shape, step = (1, 96, 64 * 64), 64 * 64 if position == 1 else 1
        element = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(dtype, torch.float32)
        x = torch.empty_strided(shape, (96 * 4096, step, position), dtype=element, device="meta")
        constants = {"SETTINGS": _settings(96, size, 1e-4, beta, 1.0), **_cut(x).constants}
        kinds = {**dict.fromkeys(("output", "dx", "dy", "x"), f"*{dtype}"), "mask": mask}
        forward, backward = (
            _local_response_norm_forward_kernel,
            _local_response_norm_backward_kernel,
        )
        cases += [
            case(f"local response {name}", forward, {**kinds, "dy": None}, constants),
            case(f"local response slopes {name}", forward, {**kinds, "output": "*fp64"}, constants),
            case(f"local response backward {name}", backward, {**kinds, "slopes": "*fp64"},
                 constants),
        ]  # fmt: skip
    return cases

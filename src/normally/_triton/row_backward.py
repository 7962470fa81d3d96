"""The backward of layer norm and RMS norm.

Samples that fit the registers: one sweep, in which each of some hundred programs also sums the
parameters' gradients over its samples. Longer ones: two means of each sample, then a second sweep.
The programs' sums are added up last, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like

from .row_gradient import (
    row_norm_backward_kernel,
    row_norm_backward_long_kernel,
    row_norm_means_kernel,
)
from .row_tiles import (
    Settings,
    arithmetic,
    cdiv,
    kept_samples,
    like_rows,
    operand,
    samples_of,
    share,
    stages_of,
    tile_of,
)


@triton.jit
def _add_up(parts_ptr, target_ptr, parts, n, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    p = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_N), tl.float64)
    for start in range(0, parts, ROWS):
        there = (start + r < parts)[:, None] & (p < n)[None, :]
        lanes = (start + r).to(tl.int64)[:, None] * n + p[None, :]
        total += tl.load(parts_ptr + lanes, mask=there, other=0.0).to(tl.float64)
    tl.store(target_ptr + p, tl.sum(total, 0).to(target_ptr.dtype.element_ty), mask=p < n)


@triton.jit(do_not_specialize=("parts", "n"))
def row_sums_kernel(
    first_ptr,  # (parts, n)
    first_target_ptr,  # (n,)
    second_ptr,  # the same again, or None
    second_target_ptr,
    parts,
    n,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of the programs' sums."""
    if tl.program_id(1) == 0:
        _add_up(first_ptr, first_target_ptr, parts, n, ROWS, BLOCK_N)
    elif second_ptr is not None:
        _add_up(second_ptr, second_target_ptr, parts, n, ROWS, BLOCK_N)


def _sums_for(gradient: Tensor, parts: int, like: Tensor) -> Tensor | None:
    """Where the programs' sums for a parameter go: to its gradient, where there is one program."""
    if not gradient.numel():
        return None
    if parts == 1:
        return gradient
    return like.new_empty((parts, gradient.numel()), dtype=arithmetic(like))


def _sum_up(sums: list[Tensor | None], gradients: list[Tensor], parts: int, n: int) -> None:
    """The parameters' gradients from the programs' sums."""
    pairs = [(s, g) for s, g in zip(sums, gradients, strict=True) if s is not None]
    second = pairs[1] if len(pairs) == 2 else (None, None)
    if parts > 1 and pairs:
        rows = min(128, triton.next_power_of_2(parts))
        block = 4096 // rows
        row_sums_kernel[(cdiv(n, block), len(pairs))](
            *pairs[0], *second, parts, n, ROWS=rows, BLOCK_N=block, num_warps=8
        )


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
    settings: Settings,
) -> None:
    """Fill the gradients of either norm; an empty one was not asked for."""
    if input.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return
    start, end = settings.start, settings.end
    wants_input = grad_input.numel() > 0
    like = grad_input
    if not wants_input:
        like = input if input.is_contiguous() else empty_like(input)
    samples = samples_of(like, start, end)
    if samples is None:
        like = like_rows(like, start, end)
        samples = samples_of(like, start, end)
        assert samples is not None
    n = samples.n
    tile = tile_of("backward", n, samples.inner, input.element_size())
    dx = like if wants_input else None
    x, dy, dsum = (operand(t, like, tile.unit) for t in (input, grad_output, grad_sum))
    parameters = (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        kept_samples(mask, like, start, end), stats,
    )  # fmt: skip
    constants = {
        "CENTRED": settings.centred, "ACT": settings.act, "ACT_PARAM": settings.act_param,
        "PLUS_ONE": settings.plus_one, **tile.constants,
    }  # fmt: skip
    tiles = tile.number(samples)
    blocks = 1 if tile.whole else cdiv(n, tile.block_n)
    parts, each = share(tiles, blocks)
    gradients = [g.contiguous() for g in (grad_weight, grad_bias)]
    sums = [_sums_for(g, parts, input) for g in gradients]
    shape = tile.shape(samples)
    tensors = 2 if grad_sum is None else 3
    constants["STAGES"] = stages_of(tile, input.element_size(), tensors)
    if tile.whole:
        row_norm_backward_kernel[(parts,)](
            dx, *sums, dy, dsum, x, *parameters, *shape, each, **constants
        )
    else:
        means = None
        if dx is not None:
            means = input.new_empty((2, samples.outer * samples.inner), dtype=arithmetic(input))
            row_norm_means_kernel[(tiles,)](means, dy, x, *parameters, *shape, **constants)
        row_norm_backward_long_kernel[(blocks * parts,)](
            dx, *sums, means, dy, dsum, x, *parameters, *shape, each, **constants
        )
    _sum_up(sums, gradients, parts, n)
    for result, found in zip((grad_input, grad_weight, grad_bias), (dx, *gradients), strict=True):
        if found is not None and found is not result:
            result.copy_(found)

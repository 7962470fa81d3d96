"""Batch norm on the GPU cut where processes exchange numbers: batch norm's launches, one by one."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .batch_norm import (
    CHUNK,
    MERGED_CHANNELS,
    batch_norm_statistics_kernel,
    or_none,
    tiles_of,
)
from .channel_gradient import channel_gradient_kernel, channel_gradient_sums_kernel
from .channel_moments import channel_moments_kernel
from .channel_tiles import dense_like, dense_mask
from .running_stats import two_floats


def statistics(stats: Tensor, input: Tensor, mask: Tensor | None) -> None:
    """`normally::channel_statistics`."""
    if input.numel() == 0:
        stats.zero_()
        stats[1] = 1
        return
    x = dense_like(input, torch.empty_like(input))
    assert x is not None  # for mypy
    tiles = tiles_of(x)
    partials = stats.new_empty((3, 1, tiles.channels, tiles.splits))
    channel_moments_kernel[tiles.grid](
        x, dense_mask(mask, x), partials, 1, *tiles.shape, CHUNK=CHUNK if mask is None else 1,
        **tiles.constants,
    )  # fmt: skip
    nothing = (*(None,) * 4, 0, 0, *two_floats(0.0))  # no running statistics
    batch_norm_statistics_kernel[(triton.cdiv(tiles.channels, MERGED_CHANNELS),)](
        stats, partials, *nothing, tiles.channels, tiles.splits, UNBIASED=False,
        BLOCK_U=MERGED_CHANNELS, PARTS=triton.next_power_of_2(tiles.splits),
    )  # fmt: skip


def gradient_sums(
    sums: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
) -> None:
    """`normally::batch_norm_gradient_sums`."""
    if input.numel() == 0:
        sums.zero_()
        return
    like = torch.empty_like(input)
    tiles = tiles_of(like)
    channels = tiles.channels
    partials = stats.new_empty((2, channels, tiles.splits))
    channel_gradient_sums_kernel[tiles.grid](
        partials, dense_like(grad_output, like), bits, dense_like(input, like),
        dense_like(residual, like), dense_mask(mask, like), weight, bias, stats, 1, channels,
        channels, *tiles.shape, EPS=eps, CORRECTION=correction, ACT=act, ACT_PARAM=act_param,
        **tiles.constants,
    )  # fmt: skip
    torch.sum(partials, -1, out=sums)


def gradient(
    grad_input: Tensor,
    grad_residual: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    bits: Tensor | None,
    stats: Tensor,
    means: Tensor,
    eps: float,
    correction: int,
    act: int,
    act_param: float,
    need: int,
) -> None:
    """`normally::batch_norm_gradient`."""
    if input.numel() == 0 or not grad_input.numel() + grad_residual.numel():
        return
    like = grad_input if grad_input.numel() else grad_residual
    tiles = tiles_of(like)
    channels = tiles.channels
    if weight is not None:
        means = means * weight  # the kernel's A and B have it
    channel_gradient_kernel[tiles.grid](
        or_none(grad_input), or_none(grad_residual), dense_like(grad_output, like), bits,
        dense_like(input, like), dense_like(residual, like), dense_mask(mask, like), weight, bias,
        stats, means, 1, channels, channels, *tiles.shape, EPS=eps, CORRECTION=correction, ACT=act,
        ACT_PARAM=act_param, **tiles.constants,
    )  # fmt: skip

"""Saved bits: one an element of an output, in the order of its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton

#: A channel's rows of at most this many elements are walked across channels, as in
#: csrc/geometry.h; the GPU's kernels do so with single ones alone.
_MAX_SHORT_ROW = 8


def bits_shape(output: Tensor) -> tuple[int, int]:
    """(rows, bytes a row) of the saved bits of a dense `output`, following its order in memory.

    A dense tensor is (outer, C, inner) in memory, `inner` being the stride of the channel.
    """
    channels = output.shape[1]
    inner = output.stride(1) if channels > 1 else output.numel()
    longest = 1 if output.device.type == _triton.device_type else _MAX_SHORT_ROW
    row = channels * inner if inner <= longest else inner
    return (output.numel() // row if row else 0), (row + 7) // 8


def unpack_bits(saved: Tensor, like: Tensor) -> Tensor:
    """The saved bits as a bool tensor of the shape and strides of `like`, which is dense."""
    bits = saved.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=saved.device) & 1
    rows, _ = saved.shape
    row = like.numel() // rows if rows else 0
    flat = bits.flatten(1)[:, :row].flatten().to(torch.bool)
    return flat.as_strided(like.shape, like.stride()) if like.numel() else flat.view(like.shape)

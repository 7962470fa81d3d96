"""How the kernels that work by channel see a tensor, and cut it into tiles.

A dense tensor is (batch, outer, channels, inner) in memory. Statistics belong to a channel of a
batch: for batch norm `batch` is 1 and `outer` the samples, for group norm `batch` is the samples.
A tile is BLOCK_C channels of BLOCK_P positions: neighbours along `inner`, or along `outer` where
`inner` is 1 (BY_COLUMN: channels last).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: How all kernels are compiled. Products and sums are fused: what relies on it says tl.fma, the
#: rest is exact to a rounding either way.
OPTIONS = {"enable_fp_fusion": True}


class Tiles(NamedTuple):
    """The cut of a tensor, from its shape alone: results must not depend on the device."""

    batch: int
    outer: int
    channels: int
    inner: int
    block_c: int
    block_p: int
    row_blocks: int  # tiles along one row of `inner`
    blocks: int  # tiles along all positions of a channel
    splits: int  # programs that share them
    by_column: bool
    unit: int  # a power of two that divides the stride between neighbouring rows
    warps: int

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * triton.cdiv(self.channels, self.block_c) * self.splits,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernels' arguments that describe the tensor."""
        pitch = self.channels if self.by_column else self.inner
        return (
            self.outer, self.channels, pitch // self.unit, self.row_blocks, self.blocks,
            self.splits,
        )  # fmt: skip

    @property
    def divisible(self) -> set[str]:
        """Which of these the compiler is told to be multiples of 16."""
        names = ("outer", "channels", "pitch_units", "row_blocks", "blocks", "splits")
        return {name for name, value in zip(names, self.shape, strict=True) if value % 16 == 0}

    @property
    def constants(self) -> dict[str, int | bool]:
        """And those that fix how it is compiled."""
        return {
            "BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "BY_COLUMN": self.by_column,
            "UNIT": self.unit, "num_warps": self.warps, **OPTIONS,
        }  # fmt: skip


# Values of a tile, 8 a thread in at most 8 warps. Half ones that are read as vectors need little to
# address them, and twice as many keep as many bytes under way.
_TILE, _VECTOR_TILE = 2048, 4096
# Enough to fill the largest GPU several times over; more partial results cost more to merge.
_PROGRAMS = 2048
_MAX_SPLITS = 64


def cut(
    batch: int, outer: int, channels: int, inner: int, itemsize: int, samples: int = 1
) -> Tiles:
    """The tiles of a tensor that is (batch, outer, channels, inner) in memory.

    The channels may be those of several samples, each of which is cut as if it were alone: so are
    batches, and a sample has the same bits in any of them.
    """
    own = channels // samples
    by_column = inner == 1
    pitch = channels if by_column else inner
    unit = min(16, pitch & -pitch)
    vectors = itemsize == 2 and unit >= 8 and not by_column
    size = _VECTOR_TILE if vectors else _TILE
    if by_column:
        block_p = min(size // 64, triton.next_power_of_2(outer))
        block_c = max(8, min(size // block_p, triton.next_power_of_2(own)))
        block_p = min(size // block_c, triton.next_power_of_2(outer))
        row_blocks = 1
        blocks = triton.cdiv(outer, block_p)
    else:
        block_p = _block_of_row(inner, size)
        block_c = max(1, min(size // block_p, triton.next_power_of_2(own)))
        row_blocks = triton.cdiv(inner, block_p)
        blocks = outer * row_blocks
    tiles = triton.cdiv(own, block_c)
    splits = max(1, min(triton.cdiv(_PROGRAMS, tiles), _MAX_SPLITS, blocks // 2))
    warps = max(1, block_c * block_p // (512 if vectors else 256))
    return Tiles(
        batch, outer, channels, inner, block_c, block_p, row_blocks, blocks, splits, by_column,
        unit, warps,
    )  # fmt: skip


def _block_of_row(inner: int, size: int) -> int:
    """The power of two that leaves the fewest lanes idle; the larger one of equals."""
    widest: int = min(size, triton.next_power_of_2(inner))
    choices = [max(8, widest >> k) for k in range(3) if widest >> k >= min(256, widest)]
    return min(choices, key=lambda block: (triton.cdiv(inner, block) * block, -block))


def dense_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """`tensor` in the memory order of the dense `like`, copied where it has another."""
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    # A stride along one element means nothing.
    sizes = zip(like.shape, tensor.stride(), like.stride(), strict=True)
    if all(a == b for n, a, b in sizes if n != 1):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def dense_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask with 1 at the channels as bytes a position, in the order of memory of `like`."""
    if mask is None:
        return None
    first = like[:, :1]
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    expanded = mask.expand(first.shape).permute(order)
    return expanded.contiguous().view(torch.uint8)


@triton.jit
def wide(x):
    """A number that may be a Python one, in 64 bits: what offsets are computed in."""
    return tl.full((), x, tl.int64)


@triton.jit
def rounded(value, ptr):
    """A float64 in the dtype of what `ptr` points to."""
    if ptr.dtype.element_ty == tl.float64:
        result = value
    else:
        # In one step the interpreter makes another number of it for bfloat16.
        result = value.to(tl.float32).to(ptr.dtype.element_ty)
    return result


@triton.jit
def program_of(splits, channels, BLOCK_C: tl.constexpr):
    """What a program works on: (batch, first channel, split)."""
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits
    tiles = tl.cdiv(channels, BLOCK_C)
    return tile // tiles, (tile % tiles) * BLOCK_C, split


@triton.jit
def range_of(split, splits, blocks):
    """The tiles of a split: all splits but the last have equally many."""
    each = tl.cdiv(blocks, splits)
    start = tl.minimum(split * each, blocks)
    return start, tl.minimum(start + each, blocks)


@triton.jit
def positions_before(
    block, outer, pitch, row_blocks, BLOCK_P: tl.constexpr, BY_COLUMN: tl.constexpr
):
    """How many positions lie in the tiles before `block`, of which there is one more than tiles."""
    if BY_COLUMN:
        count = tl.minimum(wide(block) * BLOCK_P, outer)
    else:
        row = block // row_blocks
        count = wide(row) * pitch + (block - row * row_blocks) * BLOCK_P
    return count


@triton.jit
def tile_at(
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
    """A tile: offset of its first element and of its lanes from there, and those that exist.

    And the number of its first position in the batch. Starts are 64 bits, lanes 32.
    """
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    if BY_COLUMN:
        first = wide(block) * BLOCK_P
        position = wide(batch) * outer + first
        start = position * pitch + channel
        lanes = c[:, None] + p[None, :] * pitch
        # The pitch is the number of channels, and known to be a multiple of UNIT.
        exists = (channel + c < pitch)[:, None] & (first + p < outer)[None, :]
    else:
        row = block // row_blocks
        first = (block - row * row_blocks) * BLOCK_P
        line = wide(batch) * outer + row
        position = line * pitch + first
        start = (line * channels + channel) * pitch + first
        lanes = c[:, None] * pitch + p[None, :]
        exists = (channel + c < channels)[:, None] & (first + p < pitch)[None, :]
    return start, lanes, exists, position


@triton.jit
def kept_lanes(mask_ptr, exists, position, BLOCK_P: tl.constexpr):
    """The lanes of a tile that exist and are not hidden."""
    if mask_ptr is not None:
        p = tl.arange(0, BLOCK_P)
        some = tl.max(exists.to(tl.int32), 0) != 0
        kept = tl.load(mask_ptr + position + p, mask=some, other=0) != 0
        exists = exists & kept[None, :]
    return exists


@triton.constexpr_function
def accumulator(x_ptr):
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32

"""How layer norm and RMS norm see a tensor, and cut it into tiles.

A sample is what is normalized together. In memory a dense tensor is (outer, n, inner): samples are
pairs of an outer and an inner index, n values each, `inner` apart. Rows have inner = 1; the columns
of a channels-first image have not, and there the neighbours in memory are those of other samples.

A tile is ROWS samples of BLOCK_N positions. All of this depends on the sample's shape alone, and
how many programs share the samples on their number as well.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import dense_like, wide


def cdiv(a: int, b: int) -> int:
    """a/b, rounded up."""
    return -(-a // b)


class Samples(NamedTuple):
    """A dense tensor as the kernels take it."""

    outer: int
    n: int
    inner: int


class Settings(NamedTuple):
    """What a call asks for, beside its tensors."""

    start: int
    end: int  # of the dimensions that are normalized together
    centred: bool
    eps: float
    act: int = 0
    act_param: float = 0.0
    llama: bool = False  # x̂ is rounded before the weight, too
    plus_one: bool = False  # the weight is stored as its difference from 1


class Tile(NamedTuple):
    """The cut of the samples, and what follows from it."""

    rows: int
    block_n: int
    even: bool  # the blocks fill n
    columns: bool
    whole: bool  # a sample fits the registers; else it is taken in blocks
    unit: int  # a power of two that divides the distance of two samples, or of two values
    warps: int

    @property
    def constants(self) -> dict[str, int | bool]:
        return {
            "ROWS": self.rows, "BLOCK_N": self.block_n, "EVEN": self.even, "COLUMNS": self.columns,
            "UNIT": self.unit, "num_warps": self.warps,
        }  # fmt: skip

    def number(self, samples: Samples) -> int:
        """How many tiles there are."""
        if self.columns:
            return samples.outer * cdiv(samples.inner, self.rows)
        return cdiv(samples.outer, self.rows)

    def shape(self, samples: Samples) -> tuple[int, int, int]:
        """The kernels' arguments that describe the tensor."""
        if self.columns:
            return samples.outer, samples.n, samples.inner // self.unit
        return samples.outer, samples.n // self.unit, 1


#: The most values of a tile in float32: the forward keeps x, the backward x̂, the gradient and its
#: sums for weight and bias; columns need more addresses.
_MOST = {"forward": 16384, "backward": 8192}
_MOST_OF_COLUMNS = {"forward": 8192, "backward": 4096}
#: Neighbouring samples of a tile of columns, 32 bytes of float32 at least, and the most of them.
_LEAST_ROWS = {"forward": 16, "backward": 8}
_MOST_ROWS = 512
_PER_WARP = 512  # values: 16 a thread, for float32 four loads of 16 bytes
#: Programs that fill an H200 twice; each leaves a row of sums for the parameters' gradients.
_PROGRAMS = 264
#: Tiles one after the other that a float32 sum of a parameter's gradient takes up.
_MOST_TILES = 32


@functools.lru_cache(maxsize=1024)
def tile_of(direction: str, n: int, inner: int, itemsize: int) -> Tile:
    """The tile of samples of n values at a distance of `inner`, to go "forward" or "backward"."""
    double = 2 if itemsize == 8 else 1  # registers a value
    block = triton.next_power_of_2(n)
    columns = inner > 1
    least = 1
    size = 4096 // double
    if columns:
        least = _LEAST_ROWS[direction] // double
        if direction == "forward":
            size = 8192 // itemsize
    elif direction == "forward" and block > 256:
        size = 1024 // double  # a program to a row, if it has as many
    rows = max(size // block, least)
    if columns:
        rows = min(rows, triton.next_power_of_2(inner))
    rows = min(rows, _MOST_ROWS)
    most = (_MOST_OF_COLUMNS if columns else _MOST)[direction]
    whole = rows * block * double <= most // double
    if not whole:
        rows = min(32, triton.next_power_of_2(inner))
        block = 4096 // double // rows
    distance = inner if columns else n
    return Tile(
        rows, block, n % block == 0, columns, whole,
        unit=min(16, distance & -distance),
        warps=min(16, max(1, rows * block * double // _PER_WARP)),
    )  # fmt: skip


def stages_of(tile: Tile, itemsize: int, tensors: int) -> int:
    """How many tiles of a loop are under way: all but one wait in shared memory, in 64 KB or so.

    One where a load would take up a few bytes of many lines: the addresses fill the registers.
    """
    if tile.columns:
        return 1 if tile.unit * itemsize < 16 else 2
    return 3 if tile.rows * tile.block_n * itemsize * tensors <= 32 * 1024 else 2


def share(tiles: int, blocks: int = 1) -> tuple[int, int]:
    """Programs for so many tiles, each of so many blocks, and tiles for each program."""
    programs = max(1, _PROGRAMS // blocks)
    waves = cdiv(tiles, programs * _MOST_TILES)
    each = cdiv(tiles, programs * waves)
    return cdiv(tiles, each), each


def samples_of(x: Tensor, start: int, end: int) -> Samples | None:
    """The samples over dimensions [start, end) of a dense tensor; None if they lie otherwise."""
    shape = x.shape
    n = math.prod(shape[start:end])
    if end == len(shape) and x.is_contiguous():
        return Samples(x.numel() // n, n, 1)
    stride = x.stride()
    inner, size = 0, 1
    for d in range(end - 1, start - 1, -1):
        if shape[d] == 1:
            continue
        inner = inner or stride[d]
        if stride[d] != inner * size:
            return None
        size *= shape[d]
    inner = inner or 1
    # Offsets within a tile are 32 bits.
    if inner > 1 and inner * n >= 2**31:
        return None
    return Samples(x.numel() // (n * inner), n, inner)


def like_rows(x: Tensor, start: int, end: int) -> Tensor:
    """An empty tensor of x's shape whose samples are rows."""
    order = [*range(start), *range(end, x.dim()), *range(start, end)]
    base = x.new_empty([x.shape[d] for d in order])
    return base.permute([order.index(d) for d in range(x.dim())])


def operand(tensor: Tensor | None, like: Tensor, unit: int) -> Tensor | None:
    """`tensor` as the kernels take it: in the memory order of `like`, and aligned.

    The compiler orders a sum by how many values it may load at once, which an odd address would
    change: a sample would not have the bits it has in its batch.
    """
    if tensor is None:
        return None
    dense = dense_like(tensor, like)
    if unit > 1 and dense is not None and dense.data_ptr() % 16 != 0:
        return dense.clone()
    return dense


def kept_samples(mask: Tensor | None, like: Tensor, start: int, end: int) -> Tensor | None:
    """A mask of whole samples as one bool each, in the memory order of `like`."""
    if mask is None:
        return None
    first = tuple(slice(1) if start <= d < end else slice(None) for d in range(like.dim()))
    stride = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -stride[d])
    return mask.expand(like.shape)[first].permute(order).contiguous()


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, `accumulator` of the kernels."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@triton.jit
def sizes_of(n, inner, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """The sizes n and inner; the one that is a distance in memory a multiple of UNIT."""
    if COLUMNS:
        inner *= UNIT
    else:
        n *= UNIT
        inner = 1
    return n, inner


@triton.jit
def samples_at(tile, outer, n, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's first sample, the offset of its values, of its samples from there, those that exist.

    The first two in 64 bits, the lanes in 32.
    """
    r = tl.arange(0, ROWS)
    if COLUMNS:
        # Neighbours in memory, so a tile has one outer index.
        tiles = tl.cdiv(inner, ROWS)
        row = tile // tiles
        column = (tile - row * tiles) * ROWS
        first = wide(row) * inner + column
        start = wide(row) * inner * n + column
        lanes = r
        exists = (column + r < inner) & (row < outer)
    else:
        first = wide(tile) * ROWS
        start = first * n
        lanes = r * n
        exists = r < outer - first
    return first, start, lanes, exists


@triton.jit
def samples_kept(kept_ptr, first, exists, ROWS: tl.constexpr):
    """The samples that exist and are not hidden."""
    kept = exists
    if kept_ptr is not None:
        kept &= tl.load(kept_ptr + first + tl.arange(0, ROWS), mask=exists, other=0)
    return kept


@triton.jit
def positions_at(start, n, BLOCK_N: tl.constexpr, EVEN: tl.constexpr):
    """Positions of a block from its start on, and which exist."""
    p = tl.arange(0, BLOCK_N)
    return p, (p >= 0) if EVEN else (p < n - start)

"""How tensors are cut for the GPU's kernels: every position once, whatever the sizes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from normally._triton.channel_tiles import Tiles, cut, dense_like, dense_mask
from tests.helpers import lay_out

SIZES = [
    (1, 1, 1, 1), (1, 5, 3, 1), (1, 4096, 512, 1), (1, 7, 2048, 1), (1, 802816, 24, 1),
    (1, 4, 3, 35), (1, 256, 2048, 49), (1, 256, 64, 12544), (2, 1, 320, 4096), (1, 1, 640, 4096),
    (3, 49, 17, 1), (1, 2, 16, 64), (1, 3, 1, 262144), (1, 9, 7, 2), (1, 1, 1, 4097),
]  # fmt: skip


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_position_is_in_one_tile(sizes: tuple[int, int, int, int], itemsize: int) -> None:
    tiles = cut(*sizes, itemsize)
    batch, outer, channels, inner = sizes
    assert tiles.by_column == (inner == 1)
    if tiles.by_column:
        assert (tiles.blocks - 1) * tiles.block_p < outer <= tiles.blocks * tiles.block_p
    else:
        assert (tiles.row_blocks - 1) * tiles.block_p < inner <= tiles.row_blocks * tiles.block_p
        assert tiles.blocks == outer * tiles.row_blocks
    across = -(-channels // tiles.block_c)
    assert tiles.grid == (batch * across * tiles.splits,)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_the_kernels_rely_on(sizes: tuple[int, int, int, int], itemsize: int) -> None:
    tiles: Tiles = cut(*sizes, itemsize)
    for block in (tiles.block_c, tiles.block_p, tiles.unit, tiles.warps):
        assert block & (block - 1) == 0, "a power of two"
    # Saved bits are packed eight a byte, along the dimension that is contiguous.
    assert (tiles.block_c if tiles.by_column else tiles.block_p) >= 8
    assert (tiles.channels if tiles.by_column else tiles.inner) % tiles.unit == 0
    assert 1 <= tiles.splits <= 64
    assert tiles.block_c * tiles.block_p <= 4096
    # Lanes are 32 bits from the start of a tile.
    pitch = tiles.channels if tiles.by_column else tiles.inner
    assert max(tiles.block_c, tiles.block_p) * pitch + tiles.block_p < 2**31


def test_operands_are_copied_only_where_their_order_differs() -> None:
    like = torch.empty(4, 3, 5, 7).to(memory_format=torch.channels_last)
    same = torch.randn(4, 5, 7, 3).permute(0, 3, 1, 2)
    assert dense_like(same, like) is same
    other = torch.randn(4, 3, 5, 7)
    copied = dense_like(other, like)
    assert copied is not None
    assert copied.stride() == like.stride()
    assert torch.equal(copied, other)
    # One position: the strides along it mean nothing.
    flat, other = torch.empty(4, 3, 1, 1), torch.randn(4, 1, 1, 3).permute(0, 3, 1, 2)
    assert dense_like(other, flat) is other


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "order 3210", "order 1023"])
def test_masks_follow_the_positions_in_memory(layout: str) -> None:
    like = lay_out(torch.empty(4, 3, 5, 7), layout)
    like.as_strided((like.numel(),), (1,)).copy_(torch.arange(like.numel()))  # its own offsets
    mask = torch.rand(4, 1, 1, 7) < 0.5
    first = like[:, :1]
    expected = mask.expand(first.shape).flatten()[first.flatten().argsort()]
    found = dense_mask(mask, like)
    assert found is not None
    assert torch.equal(found.flatten() != 0, expected)

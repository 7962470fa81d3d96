"""How layer norm and RMS norm cut a tensor into tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from normally._triton.row_tiles import Samples, kept_samples, like_rows, samples_of, share, tile_of
from tests.helpers import lay_out


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_tile_fits_the_registers(direction: str) -> None:
    for n, inner, itemsize in itertools.product(
        (1, 2, 33, 64, 257, 1000, 4096, 8192, 16384, 50257, 2**24), (1, 2, 49, 196, 3136), (2, 4, 8)
    ):
        tile = tile_of(direction, n, inner, itemsize)
        values = tile.rows * tile.block_n
        assert tile.rows & (tile.rows - 1) == 0
        assert tile.block_n & (tile.block_n - 1) == 0
        assert values * itemsize <= 64 * 1024
        assert 1 <= tile.warps <= 16
        assert tile.columns == (inner > 1)
        assert not tile.whole or tile.block_n >= n
        assert tile.even == (n % tile.block_n == 0)
        assert (inner if tile.columns else n) % tile.unit == 0
        shape = Samples(3, n, inner)
        assert tile.number(shape) * tile.rows >= 3 * inner


def test_programs_share_all_tiles() -> None:
    for tiles, blocks in itertools.product((1, 2, 263, 264, 265, 5000, 10**6), (1, 5, 300)):
        programs, each = share(tiles, blocks)
        assert (programs - 1) * each < tiles <= programs * each
        assert each <= 32


def test_samples_of_every_order() -> None:
    """Where the values of a sample are equally far apart, and in their own order."""
    x = torch.empty(2, 3, 4, 5)
    assert samples_of(x, 2, 4) == (6, 20, 1)
    assert samples_of(x, 1, 2) == (2, 3, 20)
    assert samples_of(lay_out(x, "channels_last"), 1, 2) == (40, 3, 1)
    assert samples_of(lay_out(x, "channels_last"), 3, 4) == (8, 5, 3)
    assert samples_of(lay_out(x, "order 0132"), 2, 4) is None
    assert samples_of(torch.empty(7, 1, 1), 1, 3) == (7, 1, 1)
    rows = like_rows(lay_out(x, "order 0132"), 2, 4)
    assert rows.shape == x.shape
    assert samples_of(rows, 2, 4) == (6, 20, 1)


def test_masks_follow_the_order_of_memory() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.empty(2, 3, 5)
    for like in (x, lay_out(x, "order 102")):
        kept = kept_samples(mask.unsqueeze(-1), like, 2, 3)
        assert kept is not None
        memory = mask if like is x else mask.t()
        assert kept.flatten().tolist() == memory.flatten().tolist()
    wide = kept_samples(mask[:1].unsqueeze(-1), x, 2, 3)
    assert wide is not None
    assert wide.flatten().tolist() == [True, False, True] * 2

"""The yardstick: how fast this machine copies memory that is in no cache.

Source and target each rotate over at least four times the last-level cache and were touched
before, so a copy pays for memory traffic alone: neither for page faults, nor flattered by a cache.
"""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import Tensor

_ROTATION = 4  # times the last-level cache


class ColdCopy:
    """Copies between two rings of buffers that are never in cache when their turn comes."""

    def __init__(self, cache_bytes: int, piece_bytes: int = 32 << 20) -> None:
        count = max(2, math.ceil(_ROTATION * cache_bytes / piece_bytes))
        # Ones, not empty: an untouched page would be mapped to the one page of zeros.
        self._sources = [torch.ones(piece_bytes, dtype=torch.uint8) for _ in range(count)]
        self._targets = [torch.ones(piece_bytes, dtype=torch.uint8) for _ in range(count)]
        self._next = 0

    @property
    def ring_bytes(self) -> int:
        """What source and target each rotate over."""
        return sum(piece.numel() for piece in self._sources)

    def measure(self, dtype: torch.dtype, rounds: int) -> list[float]:
        """Bytes read and written a second, one entry a copy."""
        return [self._copy(dtype) for _ in range(rounds)]

    def _copy(self, dtype: torch.dtype) -> float:
        source = self._take(self._sources).view(dtype)
        target = self._take(self._targets).view(dtype)
        self._next += 1
        start = perf_counter()
        target.copy_(source)
        return 2 * source.numel() * source.element_size() / (perf_counter() - start)

    def _take(self, ring: list[Tensor]) -> Tensor:
        return ring[self._next % len(ring)]

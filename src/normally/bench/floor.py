"""The least that must move through memory, counted in tensors of the input's size.

What is normalized together (a row, a group, a channel's slab) is read once if it stays in a cache
until its statistics are known, and twice if it does not.
"""

from __future__ import annotations

from .operator import Case

#: Reads x and writes y; reads x and dy and writes dx. Then: the reads that are repeated.
FORWARD, BACKWARD = (2, 1), (3, 2)


def sweeps(tensors: tuple[int, int], fits: bool) -> int:
    """How many tensors move, given whether what is normalized together fits the cache.

    >>> sweeps(FORWARD, fits=True), sweeps(BACKWARD, fits=False)
    (2, 5)
    """
    once, repeated = tensors
    return once if fits else once + repeated


def bytes_of(case: Case, together: int, cache_bytes: int) -> int:
    """Of a norm whose evaluation needs the statistics, too.

    Args:
        case: its mode and its tensor's size count.
        together: how many elements are normalized together.
        cache_bytes: of the last-level cache.
    """
    fits = together * case.torch_dtype.itemsize <= cache_bytes
    tensors = sweeps(FORWARD, fits)
    if case.mode == "forward_backward":
        tensors += sweeps(BACKWARD, fits)
    return tensors * case.tensor_bytes

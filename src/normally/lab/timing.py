"""Fair timing of two things that do the same."""

from __future__ import annotations

import time
from collections.abc import Callable


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
) -> list[tuple[float, float]]:
    """Wall-clock seconds of `first` and `second`, run in turn: A B A B.

    What else the machine does then hits both alike, and the ratio of a pair means something.

    Args:
        first: called twice before the clock starts.
        second: likewise.
        seconds: stop after this time.
        least: but not before so many pairs.
        most: nor after more than these.
    """
    for _ in range(2):
        first()
        second()
    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() < deadline):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        pairs.append((middle - start, time.perf_counter() - middle))
    return pairs

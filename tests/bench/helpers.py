"""A run that takes no time to speak of, and results that were never measured."""

from __future__ import annotations

from typing import Any

from normally.bench.measure import Budget, Spread
from normally.bench.operator import Case
from normally.bench.results import CopySpeed, Record, Results, Timing

TINY = Budget(
    "tiny",
    rounds=1,
    settle=0.0,
    seconds=0.0,
    fewest_rounds=2,
    sample=0.0,
    error_elements=4096,
    copy_rounds=1,
    copy_piece=1 << 20,
)

OPTIONS: dict[str, Any] = {
    "operators": ["batch_norm"],
    "shapes": None,
    "dtypes": ["float32"],
    "layouts": ["contiguous"],
    "threads": [1],
    "budget": "tiny",
    "compile": False,
}
MACHINE: dict[str, Any] = {
    "cpu": "a processor",
    "cores": 2,
    "threads": 2,
    "load": 0.1,
    "caches": {"L1": 32 << 10, "L2": 1 << 20},
    "instruction_set": "AVX2",
    "transparent_huge_pages": "madvise",
    "torch_huge_pages": False,
    "system": "a system",
    "python": "3.10.0",
    "torch": "2.10.0",
    "normally": "0.1.0",
    "backends": {"cpu": "compiled (avx2)"},
}


def make_record(case: Case, ratio: float, floor_bytes: int, over_floor: float = 1.5) -> Record:
    """A case that took `over_floor` times its floor at 1 GB/s, torch `ratio` times as long."""
    seconds = over_floor * floor_bytes / 1e9
    error: dict[str, float | None] = {"1": 1e-7, "1e+03": 2e-7, "1e+05": None}
    return Record(
        operator=case.shape.operator,
        label=case.shape.label,
        size=case.shape.size,
        layout=case.layout,
        dtype=case.dtype,
        act=case.act,
        residual=case.has_residual,
        fused=case.fused,
        mode=case.mode,
        threads=case.threads,
        tensor_bytes=case.tensor_bytes,
        floor_bytes=floor_bytes,
        rounds=3,
        timings={
            "normally": Timing(Spread(seconds, seconds * 0.9, seconds * 1.1), error, 100, 200),
            "torch": Timing(Spread(seconds * ratio, seconds, seconds * 2), error),
        },
        speedup={"torch": Spread(ratio, ratio * 0.9, ratio * 1.1)},
    )


def make_results(records: list[Record]) -> Results:
    """A complete run with one thread at 1 GB/s."""
    copy = [CopySpeed(dtype, 1, Spread(1e9, 9e8, 1.1e9)) for dtype in ("float32", "bfloat16")]
    return Results(MACHINE, OPTIONS, "2026-11-21T00:00:00+00:00", True, copy, records)

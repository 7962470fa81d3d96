"""What a run says: geometric means beside their targets, and every case where torch is faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from .operator import Operator, Target
from .results import OURS, TORCH, Record, Results

#: From this size on a tensor is streamed, and the floor is a goal.
STREAMED_BYTES = 16_000_000
#: At most this many times the floor, float32.
FLOOR_GOALS = {"forward": 1.6, "evaluation": 1.6, "forward_backward": 2.0}


@dataclass(frozen=True)
class Mean:
    """A target and what was reached over the cases that were measured."""

    target: Target
    threads: int
    measured: int
    expected: int
    value: float | None  # None where nothing was measured

    @property
    def reached(self) -> bool:
        """Only for all of the target's cases together."""
        return (
            self.value is not None
            and self.measured == self.expected
            and self.value >= self.target.goal
        )


def means(operator: Operator, results: Results) -> list[Mean]:
    """The operator's targets for every number of threads of the run."""
    found = []
    for threads in sorted({record.threads for record in results.records}):
        for target in operator.targets:
            values = [
                record.speedup[TORCH].median
                for record in results.records
                if record.operator == operator.name
                and record.threads == threads
                and record.dtype == target.dtype
                and record.number in target.numbers
                and record.layout in target.layouts
                and record.mode == "forward_backward"
                and record.fused
                and TORCH in record.speedup
            ]
            value = geometric_mean(values) if values else None
            expected = operator.count(target)
            found.append(Mean(target, threads, len(values), expected, value))
    return found


def slower(records: Iterable[Record], other: str = TORCH) -> list[Record]:
    """The cases where the other contender is faster, the worst first."""
    found = [r for r in records if other in r.speedup and r.speedup[other].median < 1]
    return sorted(found, key=lambda record: record.speedup[other].median)


def has_floor_goal(record: Record) -> bool:
    """Whether the floor is a goal for the record: large and float32."""
    return record.tensor_bytes >= STREAMED_BYTES and record.dtype == "float32"


def far_from_floor(results: Results) -> list[tuple[Record, float, float]]:
    """(record, times the floor, goal) of the large float32 cases of ours that miss the goal."""
    found = []
    for record in results.records:
        if has_floor_goal(record) and OURS in record.timings:
            times, goal = results.over_floor(record, OURS), FLOOR_GOALS[record.mode]
            if times > goal:
                found.append((record, times, goal))
    return sorted(found, key=lambda entry: entry[2] / entry[1])


def failures(records: Iterable[Record]) -> list[tuple[Record, str, str]]:
    """(record, contender, message) of everything that raised."""
    return [(r, name, message) for r in records for name, message in r.failed.items()]

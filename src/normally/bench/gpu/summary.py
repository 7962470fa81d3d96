"""What a run says: goals beside what was reached, and every case in which torch is faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from ..results import COMPILED, OURS, TORCH
from . import network
from .results import GpuRecord, GpuResults


@dataclass(frozen=True)
class FloorGoal:
    """A share of the floor to reach, in every case whose tensor exceeds the L2."""

    what: str
    operators: tuple[str, ...]
    mode: str
    least: float


_ROWS = ("layer_norm", "rms_norm", "add_rms_norm")
_GROUPS = ("group_norm", "instance_norm")
FLOOR_GOALS = (
    FloorGoal("batch norm", ("batch_norm",), "forward", 0.85),
    FloorGoal("batch norm", ("batch_norm",), "backward", 0.85),
    FloorGoal("layer and RMS norm", _ROWS, "forward", 0.88),
    FloorGoal("layer and RMS norm", _ROWS, "backward", 0.75),
    FloorGoal("group and instance norm", _GROUPS, "forward", 0.80),
    FloorGoal("group and instance norm", _GROUPS, "backward", 0.80),
)
#: Forward+backward of batch norm with ReLU, over torch in the better of its two layouts.
FUSED_GOAL = 1.8
#: RMS norm is never slower than torch, as kernels and as calls.
RMS_GOAL = 1.0
NETWORK_GOAL = 1.2


@dataclass(frozen=True)
class Verdict:
    """A goal, in how many cases it was reached, and how far the worst one is."""

    goal: str
    unit: str  # of the values: "%" or "×"
    least: float
    values: tuple[tuple[float, str], ...]  # with the case

    @property
    def reached(self) -> int:
        """How many."""
        return sum(value >= self.least for value, _ in self.values)

    @property
    def line(self) -> str:
        """In words."""
        if not self.values:
            return f"{self.goal}: not measured"
        worst, where = min(self.values)
        middle = median(value for value, _ in self.values)
        return (
            f"{self.goal}: {self.reached} of {len(self.values)} cases, "
            f"median {self.text(middle)}, worst {self.text(worst)} ({where})"
        )

    def text(self, value: float) -> str:
        """With its unit.

        >>> Verdict("", "%", 0.8, ()).text(0.876), Verdict("", "×", 1.8, ()).text(1.234)
        ('88 %', '1.23 ×')
        """
        return f"{value * 100:.0f} %" if self.unit == "%" else f"{value:.2f} ×"


def name(record: GpuRecord) -> str:
    """The case, apart from its mode."""
    layout = " channels_last" if record.layout == "channels_last" else ""
    fusion = f" {record.fusion}" if record.fusion else ""
    size = "×".join(map(str, record.size))
    return f"{record.operator} {record.label} {size}{layout} {record.dtype}{fusion}"


def of_floor(results: GpuResults, record: GpuRecord, contender: str = OURS) -> float | None:
    """The share of the floor's speed that a contender reached."""
    if contender not in record.timings:
        return None
    return 1 / results.over_floor(record, contender)


def over_better_layout(results: GpuResults, record: GpuRecord) -> float | None:
    """How many times faster ours is than torch in whichever layout torch is faster."""
    if OURS not in record.timings:
        return None
    same = (record.operator, record.label, record.dtype, record.mode)
    times = [
        r.timings[TORCH].seconds.median
        for r in results.records
        if (r.operator, r.label, r.dtype, r.mode) == same and TORCH in r.timings
    ]
    return min(times) / record.timings[OURS].seconds.median if times else None


def floor_goal(results: GpuResults, record: GpuRecord) -> float | None:
    """The share that is a goal for the record; none where the L2 holds its tensor."""
    if record.tensor_bytes <= results.machine["gpu"]["l2_bytes"]:
        return None
    for goal in FLOOR_GOALS:
        if goal.mode == record.mode and record.operator in goal.operators:
            return goal.least
    return None


def verdicts(results: GpuResults) -> list[Verdict]:
    """Every goal."""
    found = []
    for goal in FLOOR_GOALS:
        values = [
            (share, name(record))
            for record in results.records
            if record.operator in goal.operators
            and record.mode == goal.mode
            and floor_goal(results, record) is not None
            and (share := of_floor(results, record)) is not None
        ]
        text = f"{goal.what} {goal.mode}, {goal.least * 100:.0f} % of the floor"
        found.append(Verdict(text, "%", goal.least, tuple(values)))
    both = [r for r in results.records if r.mode == "forward_backward"]
    found.append(
        Verdict(
            f"batch norm with ReLU forward+backward, {FUSED_GOAL} × torch in its better layout",
            "×",
            FUSED_GOAL,
            tuple(
                (value, name(record))
                for record in both
                if record.operator == "batch_norm" and record.act == "relu" and record.number <= 4
                if (value := over_better_layout(results, record)) is not None
            ),
        )
    )
    found += [_rms(results, eager=False), _rms(results, eager=True), _network(results)]
    return found


def _rms(results: GpuResults, eager: bool) -> Verdict:
    values = []
    for record in results.records:
        if record.operator in ("rms_norm", "add_rms_norm"):
            value = record.eager_speedup(TORCH) if eager else _speedup(record, TORCH)
            if value is not None:
                values.append((value, f"{record.mode} {name(record)}"))
    what = "RMS norm as eager calls" if eager else "RMS norm as kernels"
    return Verdict(f"{what}, never slower than torch", "×", RMS_GOAL, tuple(values))


def _network(results: GpuResults) -> Verdict:
    values = [
        (n.speedup[network.FUSED].median, f"batch {n.batch}, {n.source}")
        for n in results.networks
        if network.FUSED in n.speedup
    ]
    return Verdict(f"{network.TITLE}, {NETWORK_GOAL} ×", "×", NETWORK_GOAL, tuple(values))


@dataclass(frozen=True)
class Loss:
    """A case in which another contender is faster."""

    ratio: float
    other: str
    how: str  # "replayed" or "eager"
    record: GpuRecord


def losses(results: GpuResults, others: Iterable[str] | None = None) -> list[Loss]:
    """All of them over the contenders, or over some, the worst first."""
    found = []
    for record in results.records:
        for other in contenders(results) if others is None else others:
            ratios = {"replayed": _speedup(record, other), "eager": record.eager_speedup(other)}
            found += [
                Loss(ratio, other, how, record)
                for how, ratio in ratios.items()
                if ratio is not None and ratio < 1
            ]
    return sorted(found, key=lambda loss: loss.ratio)


def contenders(results: GpuResults) -> list[str]:
    """Beside ours: torch, torch.compile, then the libraries."""
    known = {name for record in results.records for name in record.timings}
    first = [name for name in (TORCH, COMPILED) if name in known]
    return [*first, *(name for name in results.others if name in known)]


def failures(results: GpuResults) -> list[str]:
    """Everything that raised, a line a contender, case and mode."""
    lines = [
        f"{other} {record.mode} {name(record)}: {message}"
        for record in results.records
        for other, message in record.failed.items()
    ]
    lines += [f"{v}, {n.title}: {m}" for n in results.networks for v, m in n.failed.items()]
    return lines


def _speedup(record: GpuRecord, other: str) -> float | None:
    return record.speedup[other].median if other in record.speedup else None

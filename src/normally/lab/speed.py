"""Our batch normalization against torch's: fair timing, and the section that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import normally
from normally import report
from normally.lab.experiment import Results
from normally.lab.figures import intervals
from normally.lab.verdict import Effect, bootstrap

# Name, shape, channels_last; the last is too small for anything but the call itself to count.
SHAPES = (
    ("(64, 6, 8, 8), this LeNet's first", (64, 6, 8, 8), False),
    ("(32, 64, 56, 56)", (32, 64, 56, 56), False),
    ("(32, 64, 56, 56) channels_last", (32, 64, 56, 56), True),
    ("(32, 256, 14, 14)", (32, 256, 14, 14), False),
    ("(32, 256, 14, 14) channels_last", (32, 256, 14, 14), True),
    ("(2, 16, 8, 8), pure overhead", (2, 16, 8, 8), False),
)


# A waiting thread keeps the others at the barrier: a little of it spoils every time.
_WAITED = 0.05


def measure(seconds: float) -> dict[str, Any]:
    """Pairs of times for every shape, forward + backward with ReLU, and what they ran on.

    Args:
        seconds: for each shape.
    """
    pairs, waited = [], []
    for _, shape, channels_last in SHAPES:
        start, waiting = time.perf_counter(), _waiting()
        pairs.append(_time(shape, channels_last, seconds))
        wall = time.perf_counter() - start
        waited.append(None if waiting is None else ((_waiting() or 0.0) - waiting) / wall)
    return {
        "pairs": pairs,
        "waited": waited,
        "backend": f"{normally.backends()['cpu']}, threads: {torch.get_num_threads()}",
    }


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


def _waiting() -> float | None:
    """Seconds that all threads of this process were ready to run and had no core; Linux only."""
    try:
        tasks = list(Path("/proc/self/task").glob("*/schedstat"))
        return sum(int(task.read_text().split()[1]) for task in tasks) / 1e9 if tasks else None
    except (OSError, ValueError, IndexError):
        return None


def layers(num_features: int) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with ReLU; torch's at its best, in place."""
    ours = normally.nn.BatchNorm2d(num_features, act="relu")
    return ours, nn.Sequential(nn.BatchNorm2d(num_features), nn.ReLU(inplace=True))


def _time(shape: Sequence[int], channels_last: bool, seconds: float) -> list[tuple[float, float]]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(*shape).contiguous(memory_format=layout).requires_grad_()
    gradient = torch.randn(*shape).contiguous(memory_format=layout)
    ours, theirs = layers(shape[1])

    def step(layer: nn.Module) -> Callable[[], None]:
        def forward_backward() -> None:
            x.grad = None
            layer(x).backward(gradient)

        return forward_backward

    return interleaved(step(ours), step(theirs), seconds=seconds)


def ratio(results: Results, shape: int) -> Effect:
    """Ratio of torch's time to ours: the median over pairs, with its interval."""
    ratios = [theirs / ours for ours, theirs in _timings(results, shape)]
    low, high = bootstrap(ratios, np.median, resamples=2000)
    return Effect(SHAPES[shape][0], tuple(ratios), float(np.median(ratios)), low, high, "×")


def disturbed(results: Results, shape: int) -> bool:
    """Whether other programs held the cores for more than `_WAITED` of the time, in every round."""
    return not _quiet(results, shape)


def _quiet(results: Results, shape: int) -> list[int]:
    """The seeds in whose round this process had its cores, or could not tell."""
    seeds = results.seeds("speed")
    waited = [fractions[shape] for fractions in results.get("speed", "waited")]
    return [seed for seed, w in zip(seeds, waited, strict=True) if w is None or w <= _WAITED]


def _timings(results: Results, shape: int) -> list[tuple[float, float]]:
    """The pairs of all quiet rounds; of all rounds where none was quiet."""
    seeds = _quiet(results, shape) or results.seeds("speed")
    return [pair for pairs in results.get("speed", "pairs", seeds) for pair in pairs[shape]]


def _color(speed: Effect, doubt: bool) -> str:
    if doubt:
        return report.GREY
    return report.BLUE if speed.estimate >= 1 else report.VERMILLION


def section(results: Results) -> report.Section:
    """Figure and table over all shapes, from the records of the variant "speed"."""
    speeds = [ratio(results, index) for index in range(len(SHAPES))]
    unsure = [disturbed(results, index) for index in range(len(SHAPES))]
    canvas, axes = report.panel("torch's time / ours (1 = equal)", "", width=6.2, height=3.1)
    intervals(
        axes,
        [speed.name for speed in speeds],
        [speed.estimate for speed in speeds],
        [speed.low for speed in speeds],
        [speed.high for speed in speeds],
        [_color(speed, doubt) for speed, doubt in zip(speeds, unsure, strict=True)],
    )
    axes.axvline(1, color=report.GREY, linewidth=1.2)
    axes.set_xscale("log", base=2)
    ends = min(0.5, *(s.low for s in speeds)) * 0.9, max(2.0, *(s.high for s in speeds)) * 1.1
    ticks = [2.0**k for k in range(-10, 11) if ends[0] <= 2.0**k <= ends[1]]
    axes.set_xticks(ticks[:: 1 + len(ticks) // 7])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
    axes.set_xlim(*ends)
    rows = []
    for index, speed in enumerate(speeds):
        ours, theirs = (
            1e6 * np.median(times) for times in zip(*_timings(results, index), strict=True)
        )
        rows.append(
            [
                speed.name + (", disturbed" if unsure[index] else ""),
                f"{ours:,.0f} µs",
                f"{theirs:,.0f} µs",
                f"{speed.estimate:.2f} ×",
                f"{speed.low:.2f} – {speed.high:.2f}",
                f"{len(speed.values)}",
            ]
        )
    clean = [speed for index, speed in enumerate(speeds) if not unsure[index]]
    slower = [speed.name for speed in clean if speed.high < 1]
    lost = f"slower for {'; '.join(slower)}" if slower else "slower for none"
    won = sum(speed.low > 1 for speed in clean)
    warning = (
        f" **{sum(unsure)} of {len(speeds)} measurements were disturbed by other programs** "
        f"(in every round these threads waited for a core for over {100 * _WAITED:g} % of the "
        "time): grey, not counted, and not to be trusted. Measure again on a quiet machine."
    )
    backends = "; ".join(sorted(set(results.get("speed", "backend"))))
    return report.Section(
        "Our layer against torch's, on this machine",
        [
            f"Forward + backward of batch normalization with ReLU, float32; "
            f"normally's CPU backend: {backends}. Ours is faster "
            f"for {won} of {len(clean)} shapes and {lost}." + (warning if any(unsure) else ""),
            'In a model it is one line: `normally.nn.BatchNorm2d(64, act="relu")` in place of '
            "`BatchNorm2d(64)` and `ReLU()`. `normally bench batch_norm` measures more shapes, "
            "dtypes and layouts, with bytes and errors.",
            report.Figure(
                "speed",
                [canvas],
                "Dot: median of the ratio over interleaved pairs; bar: 95 % bootstrap interval. "
                "Right of the line normally is faster.",
                columns=1,
            ),
            report.Table(
                ["input", "normally", "torch", "ratio", "95 % interval", "pairs"],
                rows,
                "Medians of wall-clock time. One round a seed; a round in which these threads "
                f"waited for a core for over {100 * _WAITED:g} % of the time is left out.",
            ),
        ],
    )

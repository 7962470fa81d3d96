"""A panel of the run: a row a shape, marks along a logarithmic axis with the line at 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import report
from .operator import LAYOUTS
from .results import OURS, TORCH, Record, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLORS = {"contiguous": report.BLUE, "channels_last": report.VERMILLION}


def _rows(records: Sequence[Record]) -> dict[str, int]:
    """A height for each shape, the first on top."""
    titles = list(dict.fromkeys(_shape(r) for r in records))
    return {title: len(titles) - 1 - index for index, title in enumerate(titles)}


def _shape(record: Record) -> str:
    return f"{record.label}  {'×'.join(map(str, record.size))}"


def _offset(record: Record) -> float:
    """Keep a shape's marks apart: layouts above each other, the norm alone below its fusion."""
    layout = 0.2 if record.layout == LAYOUTS[0] else -0.2
    return layout + (0.08 if record.fused else -0.08)


def speedups(records: Sequence[Record], dtype: str) -> Canvas:
    """Medians with quartiles; filled as in the networks, hollow for the norm alone."""
    rows = _rows(records)
    with report.style():
        canvas, axes = report.panel(
            "times faster than torch", "", dtype, width=5.2, height=1.1 + 0.42 * len(rows)
        )
        axes.set_xscale("log")
        axes.axvline(1.0, color=report.GREY, linewidth=1.5)
        for record in records:
            ratio = record.speedup.get(TORCH)
            if ratio is None:
                continue
            color = COLORS[record.layout]
            axes.errorbar(
                ratio.median,
                rows[_shape(record)] + _offset(record),
                xerr=[[ratio.median - ratio.low], [ratio.high - ratio.median]],
                color=color,
                marker="o",
                markersize=5,
                markerfacecolor=color if record.fused else "none",
                linewidth=1.0,
            )
        _finish(axes, rows)
    return canvas


def floors(results: Results, records: Sequence[Record], dtype: str) -> Canvas:
    """Dots for ours, crosses for torch."""
    rows = _rows(records)
    with report.style():
        canvas, axes = report.panel(
            "times the floor", "", dtype, width=5.2, height=1.1 + 0.42 * len(rows)
        )
        axes.set_xscale("log")
        axes.axvline(1.0, color=report.GREY, linewidth=1.5)
        for record in records:
            height = rows[_shape(record)] + _offset(record)
            for name, marker in ((OURS, "o"), (TORCH, "x")):
                if name in record.timings:
                    axes.plot(
                        results.over_floor(record, name),
                        height,
                        color=COLORS[record.layout],
                        marker=marker,
                        markersize=5,
                    )
        _finish(axes, rows)
    return canvas


def _finish(axes: Axes, rows: dict[str, int]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    shown = _ticks(*axes.get_xlim())
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([f"{tick:g}×" for tick in shown])
    axes.grid(axis="y", visible=False)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of two from `low` to `high` that include 1, spread until there are few enough.

    >>> _ticks(0.4, 9.0)
    [0.5, 1.0, 2.0, 4.0, 8.0]
    >>> _ticks(0.2, 1000.0)
    [0.25, 1.0, 4.0, 16.0, 64.0, 256.0]
    """
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = -(-len(powers) // most)
    return [2.0**power for power in powers if power % step == 0]

"""Drawings that experiments share; call them within `report.style()`, as the engine does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def curves(
    axes: Axes,
    x: Sequence[float],
    by_seed: Sequence[Sequence[float | None]],
    color: str,
    *,
    dashed: bool = False,
) -> None:
    """The median over seeds as a line, all seeds between the edges of a band.

    A missing value counts as infinite (a loss that diverged): it leaves the picture at the top
    instead of making the others look better. Fix the y-limits of the axes before.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.array([[np.inf if v is None else v for v in row] for row in by_seed], dtype=float)
    top = axes.get_ylim()[1]
    ceiling = top * 10 if axes.get_yscale() == "log" else top + abs(top)
    values = np.minimum(values, ceiling)
    axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(x, np.median(values, 0), color=color, linestyle=(0, (5, 2)) if dashed else "-")


def intervals(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    colors: Sequence[str],
) -> None:
    """One point with its interval a row, from the top down."""
    for row, (value, low, high, color) in enumerate(zip(values, lows, highs, colors, strict=True)):
        axes.plot([low, high], [row, row], color=color, linewidth=4, alpha=0.4)
        axes.plot(value, row, "o", color=color, markersize=8)
        axes.annotate(
            f"{value:.2f}",
            (value, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def plain_ticks(axis: Axis) -> None:
    """Numbers as they are spoken on a logarithmic axis; call it when its limits are set."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def spread(axes: Axes, place: float, values: Sequence[float], color: str) -> None:
    """A dot at the median, and a bar from the 5th to the 95th percentile."""
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    axes.plot([place, place], [low, high], color=color, linewidth=4, alpha=0.4)
    axes.plot(place, middle, "o", color=color, markersize=6.5)

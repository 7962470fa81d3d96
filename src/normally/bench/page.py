"""The run as an HTML page: speed-ups against the line at 1, times the floor, all numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import report
from . import summary, table
from .operator import LAYOUTS, MODES, Operator
from .results import COMPILED, OURS, TORCH, Record, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLORS = {"contiguous": report.BLUE, "channels_last": report.VERMILLION}
_MODES = {
    "forward": "Forward",
    "forward_backward": "Forward + backward",
    "evaluation": "Evaluation",
}


def write(results: Results, operators: Sequence[Operator], path: str | os.PathLike[str]) -> Path:
    """Write the page; returns its absolute path."""
    return report.write(build(results, operators), path, figures=False)


def build(results: Results, operators: Sequence[Operator]) -> report.Page:
    """The page of a run, as data."""
    means = [(o, mean) for o in operators for mean in summary.means(o, results)]
    compared = [r for r in results.records if TORCH in r.speedup]
    worse = summary.slower(compared)
    cards = [
        report.Card(
            label=f"{operator.name}, {mean.target.label}, {table.threads_text(mean.threads)}",
            value="-" if mean.value is None else f"{mean.value:.2f}×",
            note=f"target {mean.target.goal}×; {mean.measured} of {mean.expected} cases",
            tone="good" if mean.reached else "bad",
        )
        for operator, mean in means
    ]
    cards.append(
        report.Card(
            "Cases where torch is faster",
            f"{len(worse)} of {len(compared)}",
            tone="bad" if worse else "good",
        )
    )
    sections = [_verdicts(results, operators)]
    for operator in operators:
        records = [r for r in results.records if r.operator == operator.name]
        for threads in sorted({r.threads for r in records}, reverse=True):
            chosen = [r for r in records if r.threads == threads]
            sections.append(_plots(results, operator.name, threads, chosen))
    sections.append(_numbers(results))
    return report.Page(
        title=f"{_words(operators)}: ours against torch",
        summary=(
            "Our layers against torch's, interleaved in one process on this machine: forward, "
            "forward+backward and evaluation, with the activation and residual of each shape and "
            "without."
        ),
        eyebrow=f"{results.created} · {results.options['budget']} budget",
        badge="" if results.complete else "interrupted",
        tone="unsure",
        cards=cards,
        sections=sections,
        footer=table.machine_lines(results),
    )


def _words(operators: Sequence[Operator]) -> str:
    """Their names as a heading: "Batch norm, layer norm"."""
    return ", ".join(o.name.replace("_", " ") for o in operators).capitalize()


def _verdicts(results: Results, operators: Sequence[Operator]) -> report.Section:
    content: list[str | report.Items | report.Table] = []
    if not results.complete:
        content.append("The run was interrupted: only what had been measured is here.")
    means = [(o, mean) for o in operators for mean in summary.means(o, results)]
    if means:
        content.append(report.Items([table.mean_line(o, mean) for o, mean in means]))
    for other in (TORCH, COMPILED):
        if worse := summary.slower(results.records, other):
            rows = [
                [_case(r), f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"]
                for r in worse
                for ratio in [r.speedup[other]]
            ]
            content.append(f"**Where {other} is faster**, the worst first:")
            content.append(report.Table(["case", "speed-up", "quartiles"], rows))
    if far := summary.far_from_floor(results):
        rows = [[_case(r), f"{times:.2f}", f"{goal}"] for r, times, goal in far]
        content.append("**Above the floor's goal**, of the float32 tensors of 16 MB and more:")
        content.append(report.Table(["case", "times the floor", "goal"], rows))
    if failures := summary.failures(results.records):
        rows = [[_case(r), name, message] for r, name, message in failures]
        content.append("**What raised:**")
        content.append(report.Table(["case", "contender", "error"], rows, text_columns=3))
    return report.Section("What was found", content)


def _case(record: Record) -> str:
    return f"{record.title}, {table.threads_text(record.threads)}"


def _plots(
    results: Results, operator: str, threads: int, records: Sequence[Record]
) -> report.Section:
    dtypes = list(dict.fromkeys(r.dtype for r in records))
    keys = [report.Key(layout, _COLORS[layout]) for layout in LAYOUTS]
    figures: list[str | report.Figure] = []
    for mode in MODES:
        chosen = [r for r in records if r.mode == mode]
        panels = [_speedups([r for r in chosen if r.dtype == dtype], dtype) for dtype in dtypes]
        figures.append(
            report.Figure(
                f"{operator}-{threads}-speedup-{mode.replace('_', '-')}",
                panels,
                f"**{_MODES[mode]}**: how many times faster than torch, median of the rounds with "
                "quartiles. Filled: with the shape's residual and activation; hollow: the norm "
                "alone. Left of the line torch is faster.",
                keys,
                columns=2,
            )
        )
        panels = [
            _floors(results, [r for r in chosen if r.dtype == dtype and r.fused], dtype)
            for dtype in dtypes
        ]
        figures.append(
            report.Figure(
                f"{operator}-{threads}-floor-{mode.replace('_', '-')}",
                panels,
                f"**{_MODES[mode]}**: time over the time of the floor's bytes at cold-copy speed, "
                "fused. Dots: normally; crosses: torch. Below 1 tensors stay in cache, or the copy "
                "was disturbed: see its quartiles at the end.",
                keys,
                columns=2,
            )
        )
    return report.Section(f"{operator}, {table.threads_text(threads)}", figures)


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


def _speedups(records: Sequence[Record], dtype: str) -> Canvas:
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
            color = _COLORS[record.layout]
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


def _floors(results: Results, records: Sequence[Record], dtype: str) -> Canvas:
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
                        color=_COLORS[record.layout],
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


def _numbers(results: Results) -> report.Section:
    heads = ["case", *table.columns(results, wide=True)]
    rows = [
        [f"{record.operator} {_case(record)}", *cells]
        for record in results.records
        for cells in [table.cells(results, record, wide=True)]
    ]
    caption = (
        "Errors are the largest |output - float64| at "
        "mean/std 1, 1e3 and 1e5, on inputs cut to fewer samples or channels; saved is MiB kept "
        "for the backward."
    )
    return report.Section("Every number", [report.Table(heads, rows, caption)])

"""The run as an HTML page: speed-ups against the line at 1, times the floor, all numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import report
from . import plots, summary, table
from .operator import LAYOUTS, MODES, Operator
from .results import TORCH, Record, Results

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
            label=f"{operator.name}, {mean.target.label}, {mean.target.dtype}, "
            f"{table.threads_text(mean.threads)}",
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
    for other in results.compared:
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
    keys = [report.Key(layout, plots.COLORS[layout]) for layout in LAYOUTS]
    figures: list[str | report.Figure] = []
    for mode in MODES:
        chosen = [r for r in records if r.mode == mode]
        panels = [
            plots.speedups([r for r in chosen if r.dtype == dtype], dtype) for dtype in dtypes
        ]
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
            plots.floors(results, [r for r in chosen if r.dtype == dtype and r.fused], dtype)
            for dtype in dtypes
        ]
        figures.append(
            report.Figure(
                f"{operator}-{threads}-floor-{mode.replace('_', '-')}",
                panels,
                f"**{_MODES[mode]}**: time over the time of the floor's bytes at cold-copy speed, "
                "as in the networks. Dots: normally; crosses: torch. Below 1 a tensor was cached, "
                "or the copy was disturbed: see its quartiles at the end.",
                keys,
                columns=2,
            )
        )
    return report.Section(f"{operator}, {table.threads_text(threads)}", figures)


def _numbers(results: Results) -> report.Section:
    heads = ["case", *table.columns(results, wide=True)]
    rows = [
        [_case(record), *cells]
        for record in results.records
        for cells in [table.cells(results, record, wide=True)]
    ]
    caption = (
        "Errors are the largest |output - float64| at "
        "mean/std 1, 1e3 and 1e5, on inputs cut to fewer samples or channels; saved is MiB kept "
        "for the backward."
    )
    return report.Section("Every number", [report.Table(heads, rows, caption)])

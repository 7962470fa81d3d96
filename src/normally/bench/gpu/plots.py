"""The figures of a run: those of the CPU's page, a panel an operator and dtype."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ... import report
from .. import plots
from ..main import OPERATORS
from ..operator import LAYOUTS
from .cases import MODES
from .results import GpuRecord, GpuResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Draw = Callable[[Sequence[GpuRecord], str], "Canvas"]


#: What is drawn: the speed-up of the whole step, and each mode beside the floor.
_DRAWN = {"speedup": "forward_backward"} | {f"floor-{m.replace('_', '-')}": m for m in MODES}


def names(results: GpuResults) -> list[str]:
    """The files that `figures` has."""
    modes = {record.mode for record in results.records}
    slug = results.machine["gpu"]["slug"]
    return [f"{slug}-{what}.svg" for what, mode in _DRAWN.items() if mode in modes]


def figures(results: GpuResults) -> dict[str, report.Figure]:
    """By file name."""
    layouts = [name for name in LAYOUTS if any(r.layout == name for r in results.records)]
    keys = [report.Key(layout, plots.COLORS[layout]) for layout in layouts]
    made = {}
    for file in names(results):
        name = file.removesuffix(".svg")
        what = name.removeprefix(f"{results.machine['gpu']['slug']}-")
        draw = plots.speedups if what == "speedup" else partial(plots.floors, results)
        records = [r for r in results.records if r.mode == _DRAWN[what]]
        made[file] = report.Figure(name, _panels(records, draw), "", keys, columns=2)
    return made


def _panels(records: Sequence[GpuRecord], draw: Draw) -> list[Canvas]:
    dtypes = list(dict.fromkeys(r.dtype for r in records))
    return [
        draw(chosen, f"{operator.replace('_', ' ')}, {dtype}")
        for operator in OPERATORS
        for dtype in dtypes
        if (chosen := [r for r in records if (r.operator, r.dtype) == (operator, dtype)])
    ]


def write(results: GpuResults, folder: str | os.PathLike[str]) -> list[Path]:
    """Each figure as an SVG file; the folder is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(results).items():
        path = folder / name
        path.write_text(report.standalone(figure), encoding="utf-8")
        paths.append(path)
    return paths

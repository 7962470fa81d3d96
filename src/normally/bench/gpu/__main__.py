"""`python -m normally.bench.gpu`: measure, warm the compilers' caches, or show a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..operator import LAYOUTS
from . import main, plots, table
from .cases import plan
from .device import Device, describe, lines, missing
from .results import GpuResults
from .timing import Budget, Deadline, GraphTimer

NO_GPU = 2  # the exit status


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m normally.bench.gpu", description=__doc__)
    p.add_argument("--describe", action="store_true", help="print the device and the versions")
    p.add_argument("--show", type=Path, metavar="JSON", help="print a run's table; measure nothing")
    p.add_argument("--warm", metavar="K/N", help="compile the K-th of N parts; measure nothing")
    p.add_argument("--json", type=Path, help="where the results go")
    p.add_argument("--plots", type=Path, metavar="FOLDER", help="where the figures go")
    p.add_argument("--seconds", type=float, default=200.0, help="nothing new begins after these")
    p.add_argument("--operators", type=_split, help="such as batch_norm,rms_norm; default: all")
    p.add_argument("--shapes", type=_split, help="such as 1,5a,11; default: all")
    p.add_argument("--dtypes", type=_split, default=list(main.DTYPES))
    p.add_argument("--layouts", type=_split, default=list(LAYOUTS))
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--no-networks", action="store_true", help="without ResNet-50")
    return p


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def command(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where the run did not come to its end, or 2 without a GPU."""
    given = parser().parse_args(argv)
    if given.show is not None:
        results = GpuResults.from_json(given.show.read_text(encoding="utf-8"))
        if given.plots is not None:
            plots.write(results, given.plots)
        table.show(results, sys.stdout)
        return 0 if results.complete else 1
    if reason := missing():
        print(f"normally.bench.gpu: {reason}", file=sys.stderr)
        return NO_GPU
    device = Device.current()
    if given.describe:
        print(*lines(describe(device)), sep="\n")
        return 0
    deadline = Deadline(given.seconds)
    if given.warm is not None:
        part, parts = (int(number) for number in given.warm.split("/"))
        entries = plan(given.operators, given.shapes, given.dtypes, given.layouts)[part::parts]
        where = torch.device("cuda", torch.cuda.current_device())
        main.warm(entries, where, deadline, not given.no_compile, print)
        return 0
    results = main.run(
        GraphTimer(device, Budget()),
        device,
        deadline,
        operators=given.operators,
        shapes=given.shapes,
        dtypes=given.dtypes,
        layouts=given.layouts,
        compile=not given.no_compile,
        networks=not given.no_networks,
        json_path=given.json,
    )
    if given.plots is not None:
        plots.write(results, given.plots)
    table.show(results, sys.stdout)
    return 0 if results.complete else 1


if __name__ == "__main__":
    sys.exit(command())

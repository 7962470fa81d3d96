"""Write docs/performance.md and its figures from the published runs.

    python scripts/performance_page.py benchmarks/results/*.json

Those of GPUs, benchmarks/results/gpu/*.json, are taken as well: docs/performance-gpu.md has them.
Every case of every run is on the page; where torch is faster comes first in each section. A figure
carries a digest of its numbers, so that a test can tell an old one without drawing it again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from normally import report
from normally.bench import plots, summary, table
from normally.bench.gpu import page as gpu_page
from normally.bench.gpu.results import GpuResults
from normally.bench.operator import LAYOUTS, Operator
from normally.bench.published import newest
from normally.bench.results import OURS, TORCH, Record, Results, Timing

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = DOCS / "performance.md"
FIGURES = Path("assets") / "performance"
GPU_RUNS = ROOT / "benchmarks" / "results" / "gpu"
GPU_PAGE = DOCS / "performance-gpu.md"
GPU_FIGURES = Path("assets") / "performance-gpu"
_MODES = {
    "forward_backward": "Forward + backward",
    "forward": "Forward",
    "evaluation": "Evaluation",
}
_HEAD = """# Performance

<!-- Made by scripts/performance_page.py from benchmarks/results/*.json: do not edit. -->

Our layers against torch's on the CPU, forward, forward + backward and evaluation, as the JSON in
`benchmarks/results/` has it. Nothing is left out: each section begins with the cases in which torch
is faster. [How it is measured](guide/benchmarks.md) says what the columns are; `normally bench`
makes the same tables on your machine.

"""
_ONEDNN = """oneDNN is measured where torch exposes it: torch 2.13 has it train batch norm
of 4-d tensors that are in oneDNN's own format (`to_mkldnn()`), with ReLU and with a sum. torch's
layer, group, instance and RMS norm refuse such tensors, and so do hardswish and leaky ReLU.
"""


def published_gpus() -> list[GpuResults]:
    """The runs on GPUs that are in the repository."""
    return gpu_page.load(sorted(GPU_RUNS.glob("*.json")))


def build(runs: dict[Operator, Results], gpus: Sequence[GpuResults] | None = None) -> str:
    """The page as Markdown; without `gpus` it tells of those in the repository."""
    gpus = published_gpus() if gpus is None else gpus
    parts = [_HEAD, gpu_page.pointer(gpus), *_overview(runs), "\n"]
    for operator, results in runs.items():
        parts += _section(operator, results)
    parts += _machines(runs)
    return "".join(parts).rstrip() + "\n"


def figures(runs: dict[Operator, Results]) -> dict[str, report.Figure]:
    """By file name: forward + backward of each operator and number of threads."""
    made = {}
    for operator, results in runs.items():
        for threads in _threads(results):
            records = _of(results, threads, "forward_backward")
            panels = [
                plots.speedups([r for r in records if r.dtype == dtype], dtype)
                for dtype in dict.fromkeys(r.dtype for r in records)
            ]
            layouts = [name for name in LAYOUTS if any(r.layout == name for r in records)]
            keys = [report.Key(layout, plots.COLORS[layout]) for layout in layouts]
            name = _figure_name(operator, threads)
            made[f"{name}.svg"] = report.Figure(name, panels, "", keys, columns=2)
    return made


def digests(runs: dict[Operator, Results]) -> dict[str, str]:
    """By file name: what the figure's numbers are, as a comment that its file ends with."""
    made = {}
    for operator, results in runs.items():
        for threads in _threads(results):
            records = _of(results, threads, "forward_backward")
            plotted = [(r.title, r.fused, r.speedup.get(TORCH)) for r in records]
            digest = hashlib.sha256(repr(plotted).encode()).hexdigest()
            made[f"{_figure_name(operator, threads)}.svg"] = f"<!-- numbers: {digest[:16]} -->\n"
    return made


def _figure_name(operator: Operator, threads: int) -> str:
    return f"{operator.name}-{threads}"


def _threads(results: Results) -> list[int]:
    return sorted({record.threads for record in results.records}, reverse=True)


def _of(results: Results, threads: int, mode: str) -> list[Record]:
    return [r for r in results.records if r.threads == threads and r.mode == mode]


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows)) + "\n"


def _overview(runs: dict[Operator, Results]) -> Iterator[str]:
    """A line an operator and number of threads: means, targets, losses."""
    rows = []
    for operator, results in runs.items():
        means = summary.means(operator, results)
        for threads in _threads(results):
            own = [r for r in results.records if r.threads == threads]
            compared = [r for r in own if TORCH in r.speedup]
            large = [r for r in own if summary.has_floor_goal(r)]
            far = [r for r, *_ in summary.far_from_floor(results) if r.threads == threads]
            reached = [
                f"{m.target.label}, {m.target.dtype}: "
                + ("–" if m.value is None else f"{m.value:.2f} ×")
                + f" (goal {m.target.goal:g} ×{'' if m.reached else ', **missed**'})"
                for m in means
                if m.threads == threads
            ]
            rows.append(
                [
                    f"[{_title(operator)}](#{_title(operator).lower().replace(' ', '-')})",
                    str(threads),
                    "<br>".join(reached) or "no goal of its own",
                    f"{len(summary.slower(compared))} of {len(compared)}",
                    f"{len(far)} of {len(large)}",
                ]
            )
    heads = ["operator", "threads", "times faster than torch, forward + backward, geometric mean"]
    heads += ["torch is faster", "above the floor's goal"]
    yield _rows(heads, rows, 3)
    yield (
        "The floor's goal, for float32 tensors of 16 MB and more, is "
        f"{summary.FLOOR_GOALS['forward']} times the time of the fewest bytes at cold-copy speed "
        f"for a forward and {summary.FLOOR_GOALS['forward_backward']:g} times for forward + "
        "backward. In the tables bold is what torch is faster in, and what is above this goal.\n"
    )


def _title(operator: Operator) -> str:
    words = operator.name.replace("rms", "RMS").split("_")
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def _section(operator: Operator, results: Results) -> Iterator[str]:
    yield f"## {_title(operator)}\n\n"
    for threads in _threads(results):
        own = [r for r in results.records if r.threads == threads]
        yield f"### {_title(operator)}, {table.threads_text(threads)}\n\n"
        yield from _losses([r for r in own if TORCH in r.speedup])
        for record, name, message in summary.failures(own):
            yield f"**{name} raised** in {_case(record)}: `{message}`\n\n"
        figure = FIGURES / f"{_figure_name(operator, threads)}.svg"
        yield f"![{_title(operator)}: times faster than torch]({figure.as_posix()})\n\n"
        yield "Forward + backward, medians with quartiles"
        if any(not r.fused for r in own):
            yield "; hollow: the norm without its shape's activation and residual"
        yield ".\n\n"
        for mode, title in _MODES.items():
            if records := [r for r in own if r.mode == mode]:
                yield f"{title}:\n\n"
                yield _numbers(results, records)
        yield from _beside(results, own)


def _losses(compared: Sequence[Record]) -> Iterator[str]:
    worse = summary.slower(compared)
    if not worse:
        yield f"Torch is faster in none of the {len(compared)} cases.\n\n"
        return
    yield f"**Torch is faster in {len(worse)} of {len(compared)} cases**, the worst first:\n\n"
    rows = [
        [_case(r), _MODES[r.mode].lower(), f"{s.median:.2f} × ({s.low:.2f} to {s.high:.2f})"]
        for r in worse
        for s in [r.speedup[TORCH]]
    ]
    yield _rows(["case", "mode", "speed-up (quartiles)"], rows, 2)


def _case(record: Record) -> str:
    return f"{_shape(record)} {record.layout} {record.dtype}"


def _shape(record: Record) -> str:
    return f"{record.label}: {'×'.join(map(str, record.size))} {record.fusion}".strip()


def _numbers(results: Results, records: Sequence[Record]) -> str:
    heads = ["shape", "layout", "dtype", "ours ms", "torch ms", "speed-up", "× floor", "torch"]
    heads += ["error at mean/std 1, 1e3, 1e5", "torch"]
    rows = []
    for record in records:
        cells = [_shape(record), record.layout, record.dtype]
        cells += [_ms(record.timings.get(name)) for name in (OURS, TORCH)]
        cells.append(_speedup(record, TORCH))
        cells += [_floor(results, record, name) for name in (OURS, TORCH)]
        cells += [_errors(record.timings.get(name)) for name in (OURS, TORCH)]
        rows.append(cells)
    return _rows(heads, rows, 3)


def _beside(results: Results, records: Sequence[Record]) -> Iterator[str]:
    """The other contenders, in the cases that they have."""
    for other in results.compared:
        own = [r for r in records if other in r.speedup]
        if other == TORCH or not own:
            continue
        worse = summary.slower(own, other)
        yield f"Beside {other}, which is faster in {len(worse)} of {len(own)} cases:\n\n"
        heads = ["shape", "layout", "dtype", "mode", "ours ms", f"{other} ms", "times faster"]
        rows = [
            [
                _shape(r),
                r.layout,
                r.dtype,
                _MODES[r.mode].lower(),
                _ms(r.timings.get(OURS)),
                _ms(r.timings.get(other)),
                _speedup(r, other),
                _errors(r.timings.get(other)),
            ]
            for r in own
        ]
        yield _rows([*heads, f"error of {other} at mean/std 1, 1e3, 1e5"], rows, 4)


def _ms(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.seconds.median * 1e3:.3g}"


def _speedup(record: Record, other: str) -> str:
    """Bold where the other is faster."""
    if other not in record.speedup:
        return "–"
    times = record.speedup[other].median
    return f"{times:.2f} ×" if times >= 1 else f"**{times:.2f} ×**"


def _floor(results: Results, record: Record, name: str) -> str:
    """Bold where ours is above the goal."""
    if name not in record.timings:
        return "–"
    times = results.over_floor(record, name)
    goal = summary.FLOOR_GOALS[record.mode]
    missed = name == OURS and summary.has_floor_goal(record) and times > goal
    return f"**{times:.2f}**" if missed else f"{times:.2f}"


def _errors(timing: Timing | None) -> str:
    if timing is None or timing.error is None:
        return "–"
    return ", ".join("–" if e is None else f"{e:.0e}" for e in timing.error.values())


def _machines(runs: dict[Operator, Results]) -> Iterator[str]:
    """Each run once, with the operators that are taken from it."""
    yield "## What it was measured with\n\n"
    by_run: dict[str, list[Operator]] = {}
    for operator, results in runs.items():
        by_run.setdefault(results.created, []).append(operator)
    for created, operators in by_run.items():
        results = runs[operators[0]]
        names = ", ".join(_title(operator) for operator in operators)
        yield f"{names}: {created}, {results.options['budget']} budget.\n\n"
        yield "".join(f"- {line}\n" for line in table.machine_lines(results)) + "\n"
    others = {name for results in runs.values() for name in results.others}
    if others:
        yield (
            "Other libraries are timed by themselves after the rounds that ours and torch take in "
            "turns, because their threads would disturb each other.\n\n"
        )
    yield _ONEDNN


def main(paths: Sequence[str]) -> None:
    """Write the page and the figures."""
    if not paths:
        raise SystemExit("performance_page: name the published runs, benchmarks/results/*.json.")
    runs = newest(paths)
    PAGE.write_text(build(runs), encoding="utf-8")
    folder = DOCS / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    comments = digests(runs)
    for name, figure in figures(runs).items():
        text = report.standalone(figure) + comments[name]
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.glob("*.svg"):
        if path.name not in comments:
            path.unlink()  # of a run that is no longer published
    write_gpu_page(published_gpus())


def write_gpu_page(gpus: Sequence[GpuResults]) -> None:
    """The page and the figures of GPUs; without a run there is none."""
    if gpus:
        GPU_PAGE.write_text(gpu_page.build(gpus, GPU_FIGURES.as_posix()), encoding="utf-8")
        gpu_page.write_figures(gpus, DOCS / GPU_FIGURES)
        return
    GPU_PAGE.unlink(missing_ok=True)
    for path in (DOCS / GPU_FIGURES).glob("*.svg"):
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])

"""docs/performance-gpu.md, and what docs/performance.md says of it, from the published runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ... import report
from ..main import OPERATORS
from ..results import COMPILED, OURS, TORCH
from . import device, plots, summary, table
from .cases import MODES
from .results import GpuRecord, GpuResults

_HEAD = """# Performance on a GPU

<!-- Made by scripts/performance_page.py from benchmarks/results/gpu/*.json: do not edit. -->

Forward, backward and forward + backward as replays of a CUDA graph with a cold L2, medians.
*Floor* is the share of the speed at which the fewest bytes would move, in bold below its goal.
*Better layout* is over torch in whichever of its layouts is faster, *eager* the wall time of a step
among many in flight, *host* the time of its calls alone; bold is where torch is faster.
[How it is measured](guide/benchmarks.md#on-a-gpu) says more; `make gpu` measures on your machine.

"""
_NONE = """**On a GPU: not measured yet.** The GPU kernels have no published figures: no run is in
`benchmarks/results/gpu/`. `make gpu` makes one on a machine that has a GPU;
[this is what it measures](guide/benchmarks.md#on-a-gpu).

"""


def load(paths: Iterable[str | os.PathLike[str]]) -> list[GpuResults]:
    """The runs, one a GPU: the newest.

    Raises:
        ValueError: for a run that did not come to its end, which is nothing to publish.
    """
    runs: dict[str, GpuResults] = {}
    for path in paths:
        results = GpuResults.from_json(Path(path).read_text(encoding="utf-8"))
        if not results.complete:
            raise ValueError(f"bench.gpu: {path} must be a complete run. Got complete=False.")
        known = runs.get(results.machine["gpu"]["slug"])
        if known is None or known.created < results.created:
            runs[results.machine["gpu"]["slug"]] = results
    return [runs[slug] for slug in sorted(runs)]


def pointer(runs: Sequence[GpuResults]) -> str:
    """What the page of the CPU says: that there is nothing yet, or what there is and its losses."""
    if not runs:
        return _NONE
    lines = []
    for results in runs:
        name = results.machine["gpu"]["name"]
        lost, cases = _lost(results)
        link = f"[{name}](performance-gpu.md#{results.machine['gpu']['slug']})"
        lines.append(f"**On a GPU: {link}.** Torch is faster in {lost} of {cases} cases.\n")
    return "".join(lines) + "\n"


def build(runs: Sequence[GpuResults], figures: str) -> str:
    """The page as Markdown; `figures` is the folder of the figures, relative to it."""
    return "".join([_HEAD, *(part for r in runs for part in _section(r, figures))]).rstrip() + "\n"


def _section(results: GpuResults, figures: str) -> Iterator[str]:
    yield f"## {results.machine['gpu']['name']}\n\n"
    yield from _goals(results)
    yield from _losses(results)
    yield from _networks(results)
    for name in plots.names(results):
        yield f"![{name.removesuffix('.svg').replace('-', ' ')}]({figures}/{name})\n\n"
    for operator in OPERATORS:
        yield from _numbers(results, operator)
    yield from _missing(results)
    facts = [*device.lines(results.machine), *table.copy_lines(results)]
    facts += [f"beside torch: {text}" for text in results.others.values()]
    yield f"Measured {results.created}:\n\n"
    yield "".join(f"- {line}\n" for line in facts) + "\n"


def digests(results: GpuResults) -> dict[str, str]:
    """By file name: what the figure's numbers are, as a comment that its file ends with."""
    plotted = [(r.title, r.speedup.get(TORCH), r.timings) for r in results.records]
    digest = hashlib.sha256(repr((plotted, results.copy)).encode()).hexdigest()
    return dict.fromkeys(plots.names(results), f"<!-- numbers: {digest[:16]} -->\n")


def write_figures(runs: Sequence[GpuResults], folder: Path) -> None:
    """Draw them all; files of runs that are no longer published go."""
    folder.mkdir(parents=True, exist_ok=True)
    written = set()
    for results in runs:
        comments = digests(results)
        for name, figure in plots.figures(results).items():
            text = report.standalone(figure) + comments[name]
            (folder / name).write_text(text, encoding="utf-8")
            written.add(name)
    for path in folder.glob("*.svg"):
        if path.name not in written:
            path.unlink()


def _goals(results: GpuResults) -> Iterator[str]:
    rows = []
    for verdict in summary.verdicts(results):
        if verdict.values:
            worst, where = min(verdict.values)
            count = f"{verdict.reached} of {len(verdict.values)}"
            mark = count if verdict.reached == len(verdict.values) else f"**{count}**"
            rows.append([verdict.goal, mark, f"{verdict.text(worst)}: {where}"])
        else:
            rows.append([verdict.goal, "not measured", "–"])
    yield _rows(["goal", "reached in", "the worst case"], rows, 1)


def _lost(results: GpuResults) -> tuple[int, int]:
    """In how many cases torch is faster, replayed or eager, and of how many."""
    lost = {(loss.record.key, loss.record.mode) for loss in summary.losses(results, (TORCH,))}
    return len(lost), sum(TORCH in record.speedup for record in results.records)


def _losses(results: GpuResults) -> Iterator[str]:
    lost, cases = _lost(results)
    worse = summary.losses(results, (TORCH,))
    if not worse:
        yield f"Torch is faster in none of the {cases} cases.\n\n"
    else:
        yield f"**Torch is faster in {lost} of {cases} cases**, the worst first:\n\n"
        rows = [
            [summary.name(s.record), _words(s.record.mode), s.how, f"{s.ratio:.2f} ×"]
            for s in worse
        ]
        yield _rows(["case", "mode", "as", "times faster"], rows, 3)
    for other in summary.contenders(results):
        if other != TORCH:
            compared = sum(other in r.speedup for r in results.records)
            ahead = [s for s in summary.losses(results, (other,)) if s.how == "replayed"]
            yield f"{other} is faster in {len(ahead)} of {compared} cases"
            worst = ", ".join(
                f"{s.ratio:.2f} × {_words(s.record.mode)} of {summary.name(s.record)}"
                for s in ahead[:3]
            )
            yield f", at worst: {worst}.\n\n" if worst else ".\n\n"


def _networks(results: GpuResults) -> Iterator[str]:
    for n in results.networks:
        yield f"{n.title}, batch {n.batch}, {n.source}:\n\n"
        rows = [
            [
                variant,
                f"{seconds.median * 1e3:.1f}",
                f"{n.speedup[variant].median:.2f} ×" if variant in n.speedup else "–",
                f"{n.loss[variant]:.4f}",
            ]
            for variant, seconds in n.seconds.items()
        ]
        yield _rows(["norms", "ms a step", "times faster", "first loss"], rows, 1)


def _numbers(results: GpuResults, operator: str) -> Iterator[str]:
    keys = list(dict.fromkeys(r.key for r in results.records if r.operator == operator))
    if not keys:
        return
    yield f"### {results.machine['gpu']['name']}, {operator.replace('_', ' ')}\n\n"
    heads = ["case"]
    for mode in MODES:
        heads += [f"{_words(mode)} ms", "floor", "torch ms"]
    heads += ["× torch", "× better layout", "× compile", "× eager", "host µs, torch's"]
    heads += ["error at mean/std 1, 1e3, 1e5", "torch"]
    yield _rows(heads, [_row(results, key) for key in keys], 1)


def _row(results: GpuResults, key: tuple[str, str, str, str]) -> list[str]:
    records = {mode: results.find(key, mode) for mode in MODES}
    some = next(record for record in records.values() if record is not None)
    cells = [summary.name(some).removeprefix(f"{some.operator} ")]
    for record in records.values():
        cells += [_ms(record, OURS), _share(results, record), _ms(record, TORCH)]
    both, forward = records["forward_backward"], records["forward"]
    ratios: list[float | None] = [None, None, None, None]
    if both is not None:
        ratios = [
            both.speedup[TORCH].median if TORCH in both.speedup else None,
            summary.over_better_layout(results, both),
            both.speedup[COMPILED].median if COMPILED in both.speedup else None,
            both.eager_speedup(TORCH),
        ]
    cells += [_ratio(value) for value in ratios]
    cells.append(", ".join(_micros(both, name) for name in (OURS, TORCH)))
    return cells + [_errors(forward, name) for name in (OURS, TORCH)]


def _missing(results: GpuResults) -> Iterator[str]:
    lines = [*summary.failures(results), *results.not_measured]
    if lines:
        yield "Not measured, and what raised:\n\n"
        yield "".join(f"- `{line}`\n" for line in lines) + "\n"


def _words(mode: str) -> str:
    return mode.replace("_", " + ")


def _ms(record: GpuRecord | None, name: str) -> str:
    if record is None or name not in record.timings:
        return "–"
    return f"{record.timings[name].seconds.median * 1e3:.3g}"


def _share(results: GpuResults, record: GpuRecord | None) -> str:
    share = None if record is None else summary.of_floor(results, record)
    if record is None or share is None:
        return "–"
    text = f"{share * 100:.0f} %"
    goal = summary.floor_goal(results, record)
    return f"**{text}**" if goal is not None and share < goal else text


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def _micros(record: GpuRecord | None, name: str) -> str:
    if record is None or name not in record.host:
        return "–"
    return f"{record.host[name].median * 1e6:.0f}"


def _errors(record: GpuRecord | None, name: str) -> str:
    error = None if record is None or name not in record.timings else record.timings[name].error
    if error is None:
        return "–"
    return ", ".join("–" if e is None else f"{e:.0e}" for e in error.values())


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows)) + "\n"

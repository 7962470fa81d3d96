"""The terminal's table: a row a case, then what the run says."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import summary
from .operator import Operator
from .results import COMPILED, OURS, TORCH, Record, Results

_FULL_WIDTH = 160  # from here on every column has room; also the width of a pipe
_BUSY = 0.5  # cores in use before the run began, as the load average of a minute
_NAMES = {"forward": "forward", "forward_backward": "forward+backward", "evaluation": "evaluation"}


def console(stream: TextIO | None = None) -> Console:
    """For a terminal its own width; for a file or a pipe `COLUMNS`, or room for every column."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS") or _FULL_WIDTH)
    return Console(file=stream, width=width, highlight=False)


def show(results: Results, operators: Sequence[Operator], out: Console) -> None:
    """Machine, table and verdicts."""
    out.print(*machine_lines(results), sep="\n")
    wide = out.width >= _FULL_WIDTH
    for key in dict.fromkeys((r.operator, r.threads) for r in results.records):
        records = [r for r in results.records if (r.operator, r.threads) == key]
        out.print(_table(results, records, f"{key[0]}, {threads_text(key[1])}", wide))
    out.print(_LEGEND, style="dim", markup=False)
    out.print()
    for line in verdict_lines(results, operators):
        out.print(line, soft_wrap=True)


_LEGEND = (
    "ours: normally · ms: median of the rounds · speed-up: median of the rounds' ratios torch/ours "
    "[quartiles] · ×floor: time over the floor's bytes at cold-copy speed (below 1 for what stays "
    "in cache) · error: largest |output - float64| at mean/std 1, 1e3, 1e5 · saved: MiB kept for "
    "backward; other libraries are timed after the rounds of ours and torch, by themselves"
)


def machine_lines(results: Results) -> list[str]:
    """The machine and the yardstick, a fact a line."""
    m = results.machine
    sizes = ", ".join(f"{name} {size / 2**20:.3g} MiB" for name, size in m["caches"].items())
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['instruction_set']}; {sizes}",
        f"{m['system']}, transparent huge pages: {m['transparent_huge_pages']}",
        f"Python {m['python']}, torch {m['torch']}, normally {m['normally']}, "
        f"{m['backends']['cpu']}",
    ]
    # Two busy programs on as many cores make torch's threads wait for each other: 100 times slower.
    if m["load"] is not None and m["load"] > _BUSY:
        lines.append(
            f"CAUTION: other programs kept {m['load']:.1f} cores busy when the run began; "
            "ratios of a busy machine mean little"
        )
    lines += [f"beside torch: {text}" for text in results.others.values()]
    for copy in results.copy:
        speed = copy.bytes_per_second
        lines.append(
            f"cold copy, {copy.dtype}, {threads_text(copy.threads)}: {speed.median / 1e9:.1f} GB/s "
            f"read and written [{speed.low / 1e9:.1f} to {speed.high / 1e9:.1f}]"
        )
    return lines


def verdict_lines(results: Results, operators: Sequence[Operator]) -> Iterator[str]:
    """Targets, the cases where torch is faster, the cases far from the floor, and failures."""
    if not results.complete:
        yield "Interrupted: only the cases above were measured."
    for operator in operators:
        for mean in summary.means(operator, results):
            yield mean_line(operator, mean)
    for other, operator in product(results.compared, operators):
        own = [r for r in results.records if r.operator == operator.name]
        compared = [r for r in own if other in r.speedup]
        if not compared:
            continue
        worse = summary.slower(compared, other)
        cases = f"{len(worse)} of {len(compared)} cases of {operator.name}"
        yield f"Where {other} is faster: {cases}"
        for r in worse:
            ratio = r.speedup[other]
            yield (
                f"  {ratio.median:.3f}× [{ratio.low:.3f} to {ratio.high:.3f}] "
                f"{r.title}, {threads_text(r.threads)}"
            )
    far = summary.far_from_floor(results)
    large = [r for r in results.records if summary.has_floor_goal(r)]
    if large:
        yield f"Above the floor's goal (float32, 16 MB and more): {len(far)} of {len(large)} cases"
    for r, times, goal in far:
        yield f"  {times:.2f}× the floor, goal {goal}×: {r.title}, {threads_text(r.threads)}"
    for r, name, message in summary.failures(results.records):
        yield f"FAILED {name}: {r.title}, {threads_text(r.threads)}: {message}"


def mean_line(operator: Operator, mean: summary.Mean) -> str:
    """One target beside what was reached."""
    what = f"{operator.name} forward+backward, {mean.target.dtype}, {mean.target.label}"
    if mean.value is None:
        return f"{what}, {threads_text(mean.threads)}: not measured (target {mean.target.goal}×)"
    if mean.measured < mean.expected:
        verdict = f"only {mean.measured} of {mean.expected} cases"
    else:
        verdict = "reached" if mean.reached else "NOT reached"
    return (
        f"{what}, {threads_text(mean.threads)}: geometric mean {mean.value:.2f}× "
        f"(target {mean.target.goal}×: {verdict})"
    )


def threads_text(number: int) -> str:
    """As in "1 thread".

    >>> threads_text(2)
    '2 threads'
    """
    return f"{number} thread" + ("s" if number > 1 else "")


def columns(results: Results, wide: bool) -> list[str]:
    """The heads after the case's own."""
    heads = ["ours ms", "torch ms"]
    for other in _others(results):
        heads += [f"{'compile' if other == COMPILED else other} ms", "speed-up"]
    heads += ["speed-up", "×floor", "torch"]
    return [*heads, "error", "torch", "saved", "torch"] if wide else [*heads, "error", "torch"]


def _others(results: Results) -> list[str]:
    return [name for name in results.compared if name != TORCH]


def cells(results: Results, record: Record, wide: bool) -> list[str]:
    """The texts under `columns`."""
    ours, theirs = record.timings.get(OURS), record.timings.get(TORCH)
    times = [_ms(ours), _ms(theirs)]
    for other in _others(results):
        times += [_ms(record.timings.get(other)), _ratio(record, other, wide=False)]
    floors = [
        f"{results.over_floor(record, name):.3g}" if name in record.timings else "-"
        for name in (OURS, TORCH)
    ]
    errors = [_errors(timing, wide) for timing in (ours, theirs)]
    saved = [_mebibytes(timing) for timing in (ours, theirs)] if wide else []
    return [*times, _ratio(record, TORCH, wide), *floors, *errors, *saved]


def _table(results: Results, records: list[Record], title: str, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=wide)
    for head in columns(results, wide):
        # Where the terminal is too narrow for all, the cases' names give way, not the numbers.
        table.add_column(head, justify="right", no_wrap=True)
    by_tensor = groupby(records, key=lambda r: (r.label, r.size, r.layout, r.dtype))
    for (label, size, layout, dtype), group in by_tensor:
        tensor = f"{label} {'×'.join(map(str, size))} {layout} {dtype}"
        table.add_row(Text(tensor, style="bold"))
        for record in group:
            ratio = record.speedup.get(TORCH)
            style = "red" if record.failed or (ratio is not None and ratio.median < 1) else ""
            name = f"  {_NAMES[record.mode]} {record.fusion}"
            table.add_row(name, *cells(results, record, wide), style=style)
    return table


def _ms(timing: Any) -> str:
    return "-" if timing is None else f"{timing.seconds.median * 1e3:.3g}"


def _ratio(record: Record, other: str, wide: bool) -> str:
    ratio = record.speedup.get(other)
    if ratio is None:
        return "-"
    quartiles = f" [{ratio.low:.2f}-{ratio.high:.2f}]" if wide else ""
    return f"{ratio.median:.2f}{quartiles}"


def _errors(timing: Any, wide: bool) -> str:
    if timing is None or timing.error is None:
        return "-"
    values = list(timing.error.values())
    if not wide:
        known = [value for value in values if value is not None]
        return f"{max(known):.0e}" if known else "-"
    return " ".join("-" if value is None else f"{value:.0e}" for value in values)


def _mebibytes(timing: Any) -> str:
    if timing is None or timing.saved_bytes is None:
        return ""
    return f"{timing.saved_bytes / 2**20:.3g}"

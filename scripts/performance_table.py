"""Write the README's performance table from the published runs.

    python scripts/performance_table.py benchmarks/results/*.json

Forward+backward, as in the shapes' networks, all threads: one line a shape and layout. Nothing is
chosen: every shape of the runs is there, and those where torch is faster are in bold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from normally.bench import summary
from normally.bench.operator import Operator
from normally.bench.published import newest
from normally.bench.results import OURS, TORCH, Record, Results
from normally.bench.table import threads_text

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
README = Path(__file__).parent.parent / "README.md"


def chosen(results: Results) -> list[Record]:
    """Forward+backward as in the networks, with as many threads as the run had."""
    threads = max(record.threads for record in results.records)
    return [
        record
        for record in results.records
        if record.mode == "forward_backward" and record.fused and record.threads == threads
    ]


def cell(record: Record | None) -> str:
    """Ours in ms and how many times faster; bold where torch is faster."""
    if record is None or TORCH not in record.speedup:
        return "–"
    times = record.speedup[TORCH].median
    text = f"{times:.1f} ×" if times >= 1 else f"**{times:.2f} ×**"
    return f"{record.timings[OURS].seconds.median * 1e3:.3g} ms, {text}"


def rows(operator: Operator, results: Results) -> Iterator[str]:
    """A line a shape and layout: float32, then bfloat16."""
    records = chosen(results)
    by_key = {(r.label, r.layout, r.dtype): r for r in records}
    for label, layout in dict.fromkeys((r.label, r.layout) for r in records):
        single = by_key.get((label, layout, "float32"))
        half = by_key.get((label, layout, "bfloat16"))
        if (record := single or half) is None:
            continue
        name = f"{operator.abbreviation}{record.fusion} {'×'.join(map(str, record.size))}"
        yield f"| {name} | {layout} | {cell(single)} | {cell(half)} |"


def means(operator: Operator, results: Results) -> Iterator[str]:
    """The operator's goals with all threads, and what was reached."""
    threads = max(record.threads for record in results.records)
    for mean in summary.means(operator, results):
        if mean.threads == threads and mean.value is not None:
            target = mean.target
            name = f"{operator.abbreviation} {target.label} {target.dtype}"
            yield f"{name} {mean.value:.2f} × (goal {target.goal:g} ×)"


def table(runs: dict[Operator, Results]) -> str:
    """The table and what it was measured with below it, as Markdown."""
    lines = [
        "| forward + backward | layout | float32 | bfloat16 |",
        "| --- | --- | --- | --- |",
    ]
    for operator, results in runs.items():
        lines += rows(operator, results)
    records = [record for results in runs.values() for record in results.records]
    compared = [record for record in records if TORCH in record.speedup]
    goals = [text for operator, results in runs.items() for text in means(operator, results)]
    lines += [
        "",
        "Ours in milliseconds and how many times faster than torch eager, medians of interleaved "
        f"runs; bold where torch is faster. Measured on {'; '.join(machines(runs))}. Geometric "
        f"means: {'; '.join(goals)}. The runs also have the norm alone, the forward by itself and "
        f"evaluation: torch is faster in {len(summary.slower(compared))} of all {len(compared)} "
        "cases, which [Performance](docs/performance.md) lists.",
    ]
    return "\n".join(lines)


def machines(runs: dict[Operator, Results]) -> list[str]:
    """What the runs were made on, each machine once."""
    found = {}
    for results in runs.values():
        m, threads = results.machine, max(record.threads for record in results.records)
        counted = threads_text(threads)
        text = f"{m['cpu']} ({m['instruction_set']}), {counted}, torch {m['torch']}"
        found[text] = None
    return list(found)


def main(paths: Sequence[str]) -> None:
    """Replace what stands between the two markers."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(newest(paths))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

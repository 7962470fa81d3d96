"""Write the README's performance table from a benchmark's JSON.

    python scripts/performance_table.py benchmarks/results/batch_norm-....json

Forward+backward, fused as the shape asks, all threads: one line a shape and layout. Nothing is
chosen: every shape of the run is there, and those where torch is faster are in bold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import geometric_mean

from normally.bench.results import OURS, TORCH, Record, Results

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
README = Path(__file__).parent.parent / "README.md"


def chosen(results: Results) -> list[Record]:
    """Forward+backward of the fused variants, with as many threads as the run had."""
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


def table(results: Results) -> str:
    """The table and the machine below it, as Markdown."""
    records = chosen(results)
    by_key = {(r.label, r.layout, r.dtype): r for r in records}
    lines = [
        "| forward + backward | layout | float32 | bfloat16 |",
        "| --- | --- | --- | --- |",
    ]
    for record in records:
        if record.dtype != "float32":
            continue
        size = "×".join(map(str, record.size))
        name = "BN" + ("+add" if record.residual else "") + (f"+{record.act}" if record.act else "")
        half = by_key.get((record.label, record.layout, "bfloat16"))
        lines.append(f"| {name} {size} | {record.layout} | {cell(record)} | {cell(half)} |")
    means = []
    for dtype in ("float32", "bfloat16"):
        values = [r.speedup[TORCH].median for r in records if r.dtype == dtype and r.number <= 7]
        if values:
            means.append(f"{dtype} {geometric_mean(values):.2f} ×")
    slower = sum(TORCH in r.speedup and r.speedup[TORCH].median < 1 for r in results.records)
    m = results.machine
    lines += [
        "",
        f"Ours in milliseconds and how many times faster than torch {m['torch']} eager, medians "
        f"of interleaved runs on {max(r.threads for r in records)} threads ({m['cpu']}, "
        f"{m['instruction_set']}); bold where torch is faster. Geometric mean over shapes 1 to 7: "
        + ", ".join(means) + f". The run also has the norm alone, the forward by itself and "
        f"evaluation: torch is faster in {slower} of its {len(results.records)} cases, which the "
        "page in `benchmarks/results/` lists.",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the two markers."""
    results = Results.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

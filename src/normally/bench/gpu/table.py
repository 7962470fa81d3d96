"""The one table of a run: what it says above, then a row a case, those where we lose first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO

from ..main import OPERATORS
from ..operator import LAYOUTS
from ..results import COMPILED, OURS, TORCH
from . import device, summary
from .cases import MODES
from .results import GpuRecord, GpuResults

_FEW = 12  # lines of a list, then a count
Row = tuple[str, ...]

# Short, as all of it: a lent machine hands back the last 12,000 characters of what is printed.
HEADS: Row = (
    "case", "fwd", "fl%", "bwd", "fl%", "f+b", "torch", "best", "comp", "eager", "host", "err",
)  # fmt: skip
_LEGEND = (
    "fwd, bwd, f+b: µs, graph replays, cold L2, medians · fl%: of the floor's speed · cl: "
    "channels_last",
    "f+b over ours: torch, best: torch's better layout, comp: torch.compile, eager: torch's calls, "
    "wall time",
    "host: µs a call, ours/torch · err: largest |y - float64| at mean/std 1, 1e3, 1e5, ours/torch "
    "· !: torch is faster",
)


def show(results: GpuResults, out: TextIO) -> None:
    """Device, goals, failures and what was not measured; then the table, last."""
    for line in (*device.lines(results.machine), *copy_lines(results)):
        print(line, file=out)
    for line in (*network_lines(results), *notes(results)):
        print(line, file=out)
    print("Goals, of tensors larger than the L2 where a floor is one:", file=out)
    for verdict in summary.verdicts(results):
        print(f"  {verdict.line}", file=out)
    print(*_LEGEND, sep="\n", file=out)
    for line in aligned([HEADS, *rows(results)]):
        print(line, file=out)


def copy_lines(results: GpuResults) -> Iterator[str]:
    """The yardstick."""
    for copy in results.copy:
        s = copy.bytes_per_second
        yield (
            f"copy, {copy.dtype}: {s.median / 1e9:.0f} GB/s read and written "
            f"[{s.low / 1e9:.0f} to {s.high / 1e9:.0f}]"
        )


def network_lines(results: GpuResults) -> Iterator[str]:
    """The training steps of whole networks."""
    for n in results.networks:
        parts = []
        for variant, seconds in n.seconds.items():
            times = f", {n.speedup[variant].median:.2f} ×" if variant in n.speedup else ""
            parts.append(f"{variant} {seconds.median * 1e3:.1f} ms{times}")
        yield f"{n.title}, batch {n.batch}, {n.source}: {'; '.join(parts)}"
        losses = ", ".join(f"{variant} {loss:.4f}" for variant, loss in n.loss.items())
        yield f"  loss of the first step: {losses}"


def notes(results: GpuResults) -> Iterator[str]:
    """What is missing and why."""
    if results.stopped:
        yield f"STOPPED: {results.stopped}"
    elif not results.complete:
        yield "STOPPED: only what is below had been written."
    yield from _short("FAILED", summary.failures(results))
    yield from _short("not measured", results.not_measured)


def _short(what: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines[:_FEW]:
        yield f"{what}: {line}"
    if len(lines) > _FEW:
        yield f"{what}: {len(lines) - _FEW} more, in the JSON"


def rows(results: GpuResults) -> list[Row]:
    """One a case; the worst loss first, then the others in their order."""
    worst: dict[tuple[str, ...], float] = {}
    for loss in summary.losses(results, (TORCH,)):
        worst.setdefault(loss.record.key, loss.ratio)
    keys = list(dict.fromkeys(record.key for record in results.records))
    order = {key: index for index, key in enumerate(sorted(keys, key=_place))}
    keys.sort(key=lambda key: (worst.get(key, 1.0), order[key]))
    return [_row(results, key, key in worst) for key in keys]


def _place(key: tuple[str, str, str, str]) -> tuple[int, int, str, str, int]:
    operator, label, layout, dtype = key
    number = int(label.rstrip("abcdefgh"))
    return (list(OPERATORS).index(operator), number, label, dtype, LAYOUTS.index(layout))


def _row(results: GpuResults, key: tuple[str, str, str, str], loses: bool) -> Row:
    by_mode = {mode: results.find(key, mode) for mode in MODES}
    both, forward = by_mode["forward_backward"], by_mode["forward"]
    some = next(record for record in by_mode.values() if record is not None)
    cells = [f"{'!' if loses else ' '}{_name(some)}"]
    for mode in ("forward", "backward"):
        cells += [_micros(by_mode[mode]), _share(results, by_mode[mode])]
    cells += [
        _micros(both),
        _ratio(None if both is None or TORCH not in both.speedup else both.speedup[TORCH].median),
        _ratio(None if both is None else summary.over_better_layout(results, both)),
        _ratio(
            None if both is None or COMPILED not in both.speedup else both.speedup[COMPILED].median
        ),
        _ratio(None if both is None else both.eager_speedup(TORCH)),
        _host(both),
        _errors(forward),
    ]
    return tuple(cells)


def _name(record: GpuRecord) -> str:
    """As in "BN+add+relu 2 256×256×56×56 cl bf16"."""
    short = OPERATORS[record.operator].abbreviation
    layout = " cl" if record.layout == "channels_last" else ""
    dtype = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(record.dtype, record.dtype)
    size = "×".join(map(str, record.size))
    return f"{short}{record.fusion} {record.label} {size}{layout} {dtype}"


def _micros(record: GpuRecord | None) -> str:
    """Microseconds, which need the least room: three digits, or whole ones."""
    if record is None or OURS not in record.timings:
        return "-"
    micros = record.timings[OURS].seconds.median * 1e6
    return f"{micros:.0f}" if micros >= 100 else f"{micros:.3g}"


def _share(results: GpuResults, record: GpuRecord | None) -> str:
    share = None if record is None else summary.of_floor(results, record)
    return "-" if share is None else f"{share * 100:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _host(record: GpuRecord | None) -> str:
    values = [None if record is None else record.host.get(name) for name in (OURS, TORCH)]
    return "/".join("-" if value is None else f"{value.median * 1e6:.0f}" for value in values)


def _errors(record: GpuRecord | None) -> str:
    """The worst of the three."""
    texts = []
    for name in (OURS, TORCH):
        timing = None if record is None else record.timings.get(name)
        found = [e for e in ((timing and timing.error) or {}).values() if e is not None]
        texts.append(f"{max(found):.0e}" if found else "-")
    return "/".join(texts)


def aligned(table: Sequence[Row]) -> Iterator[str]:
    """Lines; the first column is words, the others are numbers.

    >>> list(aligned([("case", "ms"), ("a", "12.5")]))
    ['case   ms', 'a    12.5']
    """
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for first, *others in table:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield " ".join([first.ljust(widths[0]), *numbers]).rstrip()

"""The page over all experiments in a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import report
from .page import TONES
from .storage import read_json


def kept(out: str | Path) -> list[tuple[str, str, str]]:
    """Name, data and budget of every experiment that has runs in this folder."""
    found = []
    for runs in sorted(Path(out).glob("*/*/runs")):
        data, _, budget = runs.parent.name.rpartition("-")
        found.append((runs.parent.parent.name, data, budget))
    return found


def write(out: str | Path) -> Path:
    """Make `index.html`: every claim with its verdict, its picture and the way to its page."""
    out = Path(out)
    entries, found = [], []
    for name, data, budget in kept(out):
        folder = f"{name}/{data}-{budget}"
        result = read_json(out / folder / "result.json")
        if isinstance(result, dict):
            picture = f"{folder}/picture.svg" if (out / folder / "picture.svg").exists() else ""
            label = f"{name} · {data} · {budget}"
            entries.append(_entry(result, folder, label, picture))
            found.append(result["verdict"]["status"])
    counts = [report.Card(status, str(found.count(status)), tone=TONES[status]) for status in TONES]
    page = report.Page(
        title="What is claimed about normalization, and what was measured",
        eyebrow="normally lab",
        summary=f"{len(found)} {'claim' if len(found) == 1 else 'claims'}, each with a test. "
        "Thresholds were fixed before the runs; where not, the experiment's text says so.",
        cards=counts if len(found) > 1 else [],
        sections=[report.Section("The claims", entries)],
        footer=[
            "A claim holds or does not hold only when the whole 95 % bootstrap interval over seeds "
            "lies on one side of its threshold; else it is inconclusive.",
        ],
    )
    return report.write(page, out / "index.html")


def _entry(result: dict[str, Any], folder: str, label: str, picture: str) -> report.Entry:
    status = result["verdict"]["status"]
    return report.Entry(
        title=result["claim"],
        link=f"{folder}/report.html",
        text=result["verdict"]["sentence"],
        badge=status,
        tone=TONES[status],
        note=f"{label} · {len(result.get('seeds', ()))} seeds",
        picture=picture,
    )

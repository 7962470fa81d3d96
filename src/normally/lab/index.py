"""The page over all experiments in a folder of results."""

from __future__ import annotations

from pathlib import Path

from .. import report
from . import registry
from .page import TONES
from .storage import read_json


def kept(out: str | Path) -> list[tuple[str, str, str]]:
    """Name, data and budget of every known experiment that has runs in this folder."""
    known = registry.experiments()
    found = []
    for runs in sorted(Path(out).glob("*/*/runs")):
        data, _, budget = runs.parent.name.rpartition("-")
        if runs.parent.parent.name in known:
            found.append((runs.parent.parent.name, data, budget))
    return found


def write(out: str | Path) -> Path:
    """Make `index.html`: every claim with its verdict and the way to its page."""
    out = Path(out)
    cards = []
    for name, data, budget in kept(out):
        result = read_json(out / name / f"{data}-{budget}" / "result.json")
        if not isinstance(result, dict):
            continue
        status = result["verdict"]["status"]
        label = f"{name} · {data} · {budget}"
        link = f"{name}/{data}-{budget}/report.html"
        cards.append(report.Card(label, status, result["claim"], TONES[status], link))
    page = report.Page(
        title="What is claimed about normalization, and what was measured",
        eyebrow="normally lab",
        summary=f"{len(cards)} {'result' if len(cards) == 1 else 'results'} in this folder.",
        cards=cards,
        sections=[],
    )
    return report.write(page, out / "index.html")

"""The page over all experiments in a folder of results."""

from __future__ import annotations

from pathlib import Path

from .. import report
from .page import TONES
from .registry import experiments
from .storage import read_json


def kept(out: str | Path) -> list[tuple[str, str, str]]:
    """Name, data and budget of every known experiment that has runs in this folder."""
    known = experiments()
    found = []
    for runs in sorted(Path(out).glob("*/*/runs")):
        data, _, budget = runs.parent.name.rpartition("-")
        if runs.parent.parent.name in known:
            found.append((runs.parent.parent.name, data, budget))
    return found


def write(out: str | Path) -> Path:
    """Make `index.html`: every claim with its verdict and the way to its page."""
    out = Path(out)
    cards, links = [], []
    for name, data, budget in kept(out):
        result = read_json(out / name / f"{data}-{budget}" / "result.json")
        if not isinstance(result, dict):
            continue
        status = result["verdict"]["status"]
        label = f"{name} · {data} · {budget}"
        cards.append(report.Card(label, status, result["claim"], TONES[status]))
        links.append((label, f"{name}/{data}-{budget}/report.html"))
    page = report.Page(
        title="What is claimed about normalization, and what was measured",
        eyebrow="normally lab",
        summary=f"{len(cards)} {'result' if len(cards) == 1 else 'results'} in this folder.",
        cards=cards,
        links=links,
        sections=[],
    )
    return report.write(page, out / "index.html")

"""Write docs/experiments/ from the experiments' files and their published results.

    python scripts/experiment_pages.py          # the pages, after an experiment's text has changed
    python scripts/experiment_pages.py runs     # take the results of `normally lab run` there first

A published result is benchmarks/results/lab/NAME.json, with docs/assets/experiments/NAME.svg. Of
several results of an experiment in the folder the one with the most runs is taken.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from normally.lab import Experiment, experiments
from normally.lab.page import number, source, source_name

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "experiments"
RESULTS = ROOT / "benchmarks" / "results" / "lab"
PICTURES = ROOT / "docs" / "assets" / "experiments"
_MADE = "<!-- Made by scripts/experiment_pages.py from the experiments' files: do not edit. -->"
_SIGNS = {"holds": "✔ holds", "does not hold": "✘ does not hold", "inconclusive": "? inconclusive"}
_INDEX = """# Experiments

{made}

What is said about batch normalization, claim by claim, each with a test. Thresholds were fixed
before the runs; where not (`bias`, `quickstart`), the experiment's text says so. `normally lab
run NAME` repeats one on your machine, and `normally lab run --all` all of them: see [the
lab](../guide/lab.md). A claim *holds* or *does not hold* only when the whole 95 % bootstrap
interval over seeds lies on one side of its threshold; else it is *inconclusive*. A page is made
from the experiment's file, which is short, and stands at its end.

| experiment | claim | verdict | what was found |
| --- | --- | --- | --- |
"""


def publish(runs: Path) -> None:
    """Take results and pictures from a folder of `normally lab run`."""
    known = experiments()
    best: dict[str, tuple[int, Path, dict[str, Any]]] = {}
    for path in sorted(runs.glob("*/*/result.json")):
        result = json.loads(path.read_text("utf-8"))
        name = result["experiment"]
        if name in known and result["runs"] > best.get(name, (0,))[0]:
            best[name] = (result["runs"], path, result)
    for folder in (RESULTS, PICTURES):
        folder.mkdir(parents=True, exist_ok=True)
    for name, (_, path, result) in best.items():
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}.json").write_text(text + "\n", "utf-8")
        shutil.copyfile(path.parent / result["figure"], PICTURES / f"{name}.svg")


def published() -> dict[str, dict[str, Any]]:
    """The results that are in the repository, by experiment."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}


def build(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """All pages, by file name."""
    pages = {}
    index = _INDEX.format(made=_MADE)
    for name, experiment in experiments().items():
        result = results.get(name)
        pages[f"{name}.md"] = _page(experiment, result)
        verdict = result["verdict"] if result else {"status": "", "sentence": "not published yet"}
        sign = _SIGNS.get(verdict["status"], "")
        index += (
            f"| [{name}]({name}.md) | {_cell(experiment.claim)} | {sign} "
            f"| {_cell(verdict['sentence'])} |\n"
        )
    return {"index.md": index, **pages}


def _page(experiment: Experiment, result: dict[str, Any] | None) -> str:
    module = inspect.getmodule(experiment.measure)
    about = (inspect.getdoc(module) or "").partition("\n\n")[2]  # its first line is the title again
    parts = [
        f"# {experiment.title}",
        _MADE,
        about,
        *(_found(experiment, result) if result else ["No result is published yet."]),
        "## The test",
        f"**Claim.** {experiment.claim}",
        f"**Source.** {experiment.source}",
        f"**Prediction.** {experiment.prediction}",
        "**Thresholds,** fixed before the runs:",
        _items(experiment.thresholds),
        "## Protocol",
        _items(experiment.protocol),
        "## Code",
        f"`normally lab run {experiment.name}` runs it. The whole experiment is "
        f"`src/normally/lab/experiments/{source_name(experiment)}`:",
        f"```python\n{source(experiment).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _found(experiment: Experiment, result: dict[str, Any]) -> list[str]:
    verdict, budget = result["verdict"], result["budget"]
    rows = [
        f"| {c['effect']} | {number(c['estimate'], c['unit'])} "
        f"| {number(c['interval'][0])} to {number(c['interval'][1])} "
        f"| ≥ {number(c['at_least'], c['unit'])} | {c['status']} |"
        for c in verdict["criteria"]
    ]
    return [
        "## What was found",
        f"**The claim {verdict['status']}.** {verdict['sentence']}"
        if verdict["status"] != "inconclusive"
        else f"**Inconclusive.** {verdict['sentence']}",
        f"![{experiment.title}](../assets/experiments/{experiment.name}.svg)",
        "| effect | mean over seeds | 95 % interval | threshold | verdict |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(rows),
        f"Data: {result['data']}; budget `{budget['name']}`, {len(result['seeds'])} seeds, "
        f"{result['runs']} runs. Measured with {'; '.join(result['measured_with'])}.",
    ]


def _items(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> None:
    """Publish, if a folder is named, and write the pages."""
    if arguments:
        publish(Path(arguments[0]))
    pages = build(published())
    PAGES.mkdir(parents=True, exist_ok=True)
    for old in PAGES.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, "utf-8")
    print(f"{len(pages)} pages in {PAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])

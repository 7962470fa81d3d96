"""The runs that are published as files: for each operator the newest that is complete."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .main import OPERATORS
from .operator import Operator
from .results import Results


def newest(paths: Iterable[str | os.PathLike[str]]) -> dict[Operator, Results]:
    """Each operator's own part of its newest run, in the order of `OPERATORS`.

    Raises:
        ValueError: for a run that was interrupted, which is nothing to publish.
    """
    runs = []
    for path in paths:
        results = Results.from_json(Path(path).read_text(encoding="utf-8"))
        if not results.complete:
            raise ValueError(f"bench: {path} must be a complete run. Got complete=False.")
        runs.append(results)
    found = {}
    for results in sorted(runs, key=lambda results: results.created):
        for name in {record.operator for record in results.records}:
            own = [record for record in results.records if record.operator == name]
            found[OPERATORS[name]] = replace(results, records=own)
    return {operator: found[operator] for operator in OPERATORS.values() if operator in found}

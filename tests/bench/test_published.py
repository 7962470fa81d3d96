"""The newest complete run of each operator is what is published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from normally.bench.operator import Case
from normally.bench.published import newest
from normally.bench.shapes import select

from .helpers import make_record, make_results


def make_run(path, created, *operators, ratio=2.0, complete=True):
    records = [
        make_record(Case(shape, "contiguous", "float32", True), ratio, 1000)
        for operator in operators
        for shape in select(operator)
    ]
    replace(make_results(records), created=created, complete=complete).write(path)
    return path


def test_the_newest_of_each_operator(tmp_path):
    paths = [
        make_run(tmp_path / "a.json", "2026-11-22T00:00:00+00:00", "batch_norm", ratio=3.0),
        make_run(tmp_path / "b.json", "2026-11-21T00:00:00+00:00", "layer_norm", "batch_norm"),
    ]
    for order in (paths, paths[::-1]):
        runs = newest(order)
        assert [operator.name for operator in runs] == ["batch_norm", "layer_norm"]
        ratios = [results.records[0].speedup["torch"].median for results in runs.values()]
        assert ratios == [3.0, 2.0]
        for operator, results in runs.items():
            assert {record.operator for record in results.records} == {operator.name}


def test_an_interrupted_run_is_refused(tmp_path):
    path = make_run(tmp_path / "a.json", "2026-11-21T00:00:00+00:00", "rms_norm", complete=False)
    with pytest.raises(ValueError, match="must be a complete run"):
        newest([path])

"""JSON there and back, means beside targets, and the lists of what is slow."""

from __future__ import annotations

import json

import pytest

from normally.bench import summary
from normally.bench.batch_norm import BatchNorm
from normally.bench.operator import LAYOUTS, Case, Target
from normally.bench.results import SCHEMA, Results
from normally.bench.shapes import select

from .helpers import make_record, make_results

OPERATOR = BatchNorm()


def all_cases(mode: str = "forward_backward", dtype: str = "float32") -> list[Case]:
    shapes = select("batch_norm")
    groups = OPERATOR.groups(shapes, [dtype], LAYOUTS)
    return [Case(c.shape, c.layout, c.dtype, c.fused, mode, 1) for g in groups for c in g]


def test_json_round_trip(tmp_path):
    results = make_results([make_record(c, 2.0, 1000) for c in all_cases()[:3]])
    path = results.write(tmp_path / "deep" / "run.json")
    again = Results.from_json(path.read_text(encoding="utf-8"))
    assert again == results
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_json_has_the_derived_numbers():
    results = make_results([make_record(all_cases()[0], 2.0, 1000, over_floor=1.5)])
    data = json.loads(results.to_json())
    assert data["schema"] == SCHEMA
    (entry,) = data["records"]
    assert entry["floor_seconds"] == pytest.approx(1000 / 1e9)
    assert entry["over_floor"] == pytest.approx({"normally": 1.5, "torch": 3.0})


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match=r"schema must be .* Got schema='other'"):
        Results.from_json('{"schema": "other"}')


def test_means_are_geometric_and_of_the_targets_cases_only():
    ratios = {"contiguous": 8.0, "channels_last": 2.0}
    records = [
        # The norm alone, and shapes 8 and 12, would spoil the means if they entered.
        make_record(c, ratios[c.layout] if c.fused and c.shape.number < 8 else 1e-3, 1000)
        for c in all_cases()
    ]
    records += [make_record(c, 1e-3, 1000) for c in all_cases(dtype="bfloat16")]
    records += [make_record(c, 1e-3, 1000) for c in all_cases(mode="forward")]
    found = summary.means(OPERATOR, make_results(records))
    assert [mean.value for mean in found] == pytest.approx([4.0, 8.0, 2.0])
    assert [mean.measured for mean in found] == [16, 8, 8]
    assert [mean.reached for mean in found] == [True, True, False]  # 3, 4 and 2.2


def test_a_target_is_not_reached_by_a_part_of_its_cases():
    records = [make_record(c, 100.0, 1000) for c in all_cases() if c.shape.number == 1]
    overall = summary.means(OPERATOR, make_results(records))[0]
    assert (overall.measured, overall.expected, overall.reached) == (2, 16, False)


def test_nothing_measured_is_no_mean():
    mean = summary.Mean(Target("x", 2.0, (1,)), 1, 0, 4, None)
    assert not mean.reached


def test_slower_cases_are_listed_worst_first():
    cases = all_cases()[:4]
    records = [
        make_record(c, ratio, 1) for c, ratio in zip(cases, (0.99, 1.0, 0.5, 3), strict=True)
    ]
    assert [r.speedup["torch"].median for r in summary.slower(records)] == [0.5, 0.99]


def test_cases_far_from_the_floor():
    by_label = {(c.shape.label, c.layout, c.fused): c for c in all_cases()}
    large, small = by_label["1", "contiguous", True], by_label["12a", "contiguous", True]
    records = [
        make_record(large, 2.0, 1000, over_floor=2.5),
        make_record(large, 2.0, 1000, over_floor=1.9),
        make_record(small, 2.0, 1000, over_floor=50.0),
    ]
    found = summary.far_from_floor(make_results(records))
    assert [(r.label, round(times, 6), goal) for r, times, goal in found] == [("1", 2.5, 2.0)]

import math

import pytest

from normally import report
from normally.lab import Results, conclude, find, run, speed
from normally.lab.data import load
from normally.lab.experiments import quickstart
from normally.lab.verdict import MIN_SEEDS

SHAPE = ("(2, 3, 4, 4)", (2, 3, 4, 4), False)


@pytest.fixture
def small(monkeypatch):
    """The experiment with a budget of seconds."""
    budget = {"seeds": 1, "epochs": 2, "batch_size": 256, "timing_seconds": 0.0}
    monkeypatch.setitem(quickstart.EXPERIMENT.budgets, "quick", budget)
    monkeypatch.setattr(speed, "SHAPES", (SHAPE, SHAPE))
    return find("quickstart")


def planted(plain_small, norm_small, plain_large, norm_large, seeds=MIN_SEEDS):
    """Results with these curves of test accuracy, the same for every seed."""
    rates = (quickstart.SMALL, quickstart.LARGE)
    curves = {("plain", rates[0]): plain_small, ("norm", rates[0]): norm_small}
    curves |= {("plain", rates[1]): plain_large, ("norm", rates[1]): norm_large}
    records = {
        (f"{side}-lr{rate:g}", seed): {"test_accuracy": curve}
        for (side, rate), curve in curves.items()
        for seed in range(seeds)
    }
    return Results(records, load("digits"), {"epochs": len(plain_small)}, seeds)


SLOW, FAST, LOW = [0.2, 0.5, 0.8, 0.92], [0.91, 0.95, 0.97, 0.98], [0.1, 0.1, 0.1, 0.1]


def test_it_runs_judges_and_makes_a_page(small, tmp_path):
    results = run(small, out=tmp_path)
    assert len(results.records) == len(small.variants) == 7
    verdict, page = conclude(small, results, out=tmp_path)
    assert verdict.status == "inconclusive"  # one seed decides nothing
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 4
    figures = sorted(path.stem for path in (page.parent / "figures").glob("*.svg"))
    assert figures == ["gamma-beta", "speed", "train-eval-gap", "training-curves"]


def test_a_run_records_curves_and_parameters(small, tmp_path):
    results = run(small, out=tmp_path)
    record = results.records["norm-lr0.3", 0]
    for key in ("train_loss", "test_accuracy", "batch_accuracy"):
        assert len(record[key]) == 2
        assert all(math.isfinite(value) for value in record[key])
    assert [len(gamma) for gamma in record["gamma"]] == [6, 16, 120, 84]
    assert results.records["plain-lr0.3", 0]["gamma"] == []
    ours, theirs = results.records["speed", 0]["pairs"][0][0]
    assert ours > 0
    assert theirs > 0


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(SLOW, FAST, LOW, FAST), "holds"),
        (planted(SLOW, FAST, FAST, FAST), "does not hold"),
        (planted(FAST, FAST, LOW, FAST), "does not hold"),
        (planted(SLOW, FAST, FAST, LOW), "does not hold"),
        (planted(SLOW, FAST, LOW, FAST, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert quickstart.judge(results).status == status


def test_a_goal_never_reached_counts_in_favour_of_the_plain_network():
    verdict = quickstart.judge(planted(LOW, FAST, LOW, FAST))
    assert verdict.criteria[0].effect.estimate == pytest.approx(5)
    assert "needs at least 5 times" in verdict.sentence


def test_where_neither_side_reaches_the_goal_nothing_is_decided():
    verdict = quickstart.judge(planted(LOW, LOW, LOW, FAST))
    assert verdict.status == "inconclusive"
    assert "neither side reached 90 %" in verdict.sentence


def test_a_diverged_seed_is_shown_as_infinite_not_left_out(small, tmp_path):
    results = run(small, out=tmp_path)
    results.records["plain-lr2", 0]["train_loss"] = [2.3, None]
    with report.style():
        _, sections = small.present(results)
    table = next(block for block in sections[0].content if isinstance(block, report.Table))
    row = next(row for row in table.rows if list(row[:2]) == ["2", "without"])
    assert row[4] == "infinite"
    assert row[-1] == "1 of 1"

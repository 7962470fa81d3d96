import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import bias
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(ratio, with_, without, seeds=MIN_SEEDS):
    """Results with these gradients' ratio and final accuracies; a list has a value a seed."""
    records = {}
    for variant, accuracy in (("with", with_), ("without", without)):
        for seed in range(seeds):
            value = accuracy[seed] if isinstance(accuracy, list) else accuracy
            record = {"ratios": [ratio, ratio / 10], "test_accuracy": [0.1, value]}
            records[variant, seed] = record
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(1e-7, 0.97, 0.97), "holds"),
        (planted(0.0, 0.97, 0.97), "holds"),
        (planted(1e-2, 0.97, 0.97), "does not hold"),
        (planted(1e-7, 0.97, 0.90), "does not hold"),
        (planted(1e-7, 0.90, 0.97), "does not hold"),
        (planted(1e-7, 0.97, [0.97, 0.92, 0.99]), "inconclusive"),
        (planted(1e-7, 0.97, 0.97, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert bias.judge(results).status == status


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 256}
    monkeypatch.setitem(bias.EXPERIMENT.budgets, "quick", budget)
    experiment = find("bias")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert [len(c["by_seed"]) for c in result["verdict"]["criteria"]] == [1, 1, 1]
    assert len(results.records["with", 0]["ratios"]) == 4
    assert results.records["without", 0]["ratios"] == []

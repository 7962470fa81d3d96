import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import placement
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

BUDGET = {"epochs": 2, "batch_size": 64, "train_images": 128, "test_images": 64}


def planted(relu=0.95, sigmoid=0.95, best=0.97, seeds=MIN_SEEDS, loss=0.1):
    """`best` is every order's accuracy at its best rate, but for behind ReLU and sigmoid."""
    records = {}
    for variant in placement.EXPERIMENT.variants:
        activation, order, rate = variant.split("-")
        behind = {"relu": relu, "sigmoid": sigmoid}[activation]
        accuracy = behind if order == "after" else best
        for seed in range(seeds):
            value = accuracy[seed] if isinstance(accuracy, list) else accuracy
            # Only the middle rate is good: the others would say the contrary.
            value = value if rate == "lr0.5" else 0.8 if order == "after" else 0.7
            records[variant, seed] = {
                "final_test": value,
                "train_loss": [2.3, loss if rate == "lr0.5" else None],
            }
    return Results(records, load("digits"), BUDGET, seeds)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "holds"),
        ({"relu": 0.97}, "does not hold"),
        ({"sigmoid": 0.975}, "does not hold"),
        ({"relu": [0.95, 0.99, 0.95]}, "inconclusive"),
        ({"seeds": 2}, "inconclusive"),
        ({"loss": None, "relu": 0.1}, "holds"),
    ],
)
def test_the_verdict_follows_the_data(changed, status):
    results = planted(**changed)
    assert placement.judge(results).status == status
    placement.present(results)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    experiment = find("placement")
    monkeypatch.setitem(experiment.budgets, "quick", {**BUDGET, "seeds": 1})
    monkeypatch.setattr(placement, "RATES", (0.1,))  # three would take three times as long
    monkeypatch.setattr(
        experiment, "variants", [v for v in experiment.variants if v.endswith("lr0.1")]
    )
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    before, after = (
        results.records[f"relu-{order}-lr0.1", 0]["train_loss"] for order in ("before", "after")
    )
    assert before != after

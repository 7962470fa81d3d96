import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import ablation
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

REPORTED = {row.variant: row.test for row in ablation.REPORTED} | {"12": 0.855}
BUDGET = {"epochs": 2, "steps": 2, "batch_size": 64, "train_images": 256, "test_images": 64}


def planted(seeds=MIN_SEEDS, loss=0.3, **changed):
    """What the reader reported, but for what is changed; a list has a value a seed."""
    records = {}
    changed = {name.removeprefix("only_"): value for name, value in changed.items()}
    for variant, accuracy in (REPORTED | changed).items():
        for seed in range(seeds):
            value = accuracy[seed] if isinstance(accuracy, list) else accuracy
            records[variant, seed] = {
                "final_test": value,
                "train_accuracy": [0.1, 0.9],
                "test_accuracy": [0.1, value],
                "train_loss": [2.3, loss],
            }
    return Results(records, load("digits"), BUDGET, seeds)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "holds"),
        ({"only_12": 0.80}, "does not hold"),
        ({"only_234": 0.86}, "does not hold"),
        ({"only_134": 0.86, "only_234": 0.86}, "does not hold"),
        ({"only_124": [0.86, 0.80, 0.86]}, "inconclusive"),
        ({"seeds": 2}, "inconclusive"),
        ({"only_12": 0.1, "loss": None}, "does not hold"),
    ],
)
def test_the_verdict_follows_the_data(changed, status):
    results = planted(**changed)
    assert ablation.judge(results).status == status
    ablation.present(results)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(ablation.EXPERIMENT.budgets, "quick", {**BUDGET, "seeds": 1})
    experiment = find("ablation")
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 2
    assert "0.769" in text  # a reported number
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"

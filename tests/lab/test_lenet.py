import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

BOUNCING, STEADY = [0.1, 0.7, 0.8, 0.7, 0.8], [0.1, 0.7, 0.75, 0.78, 0.8]
BUDGET = {"epochs": 5, "steps": 2, "batch_size": 64, "train_images": 256, "test_images": 64}


def planted(norm=0.9, test=BOUNCING, control=0.6, seeds=MIN_SEEDS, loss=0.3):
    """The plain network at .8 training accuracy; a list has a value a seed."""
    records = {}
    sides = (
        (lenet.PLAIN, 0.8, [0.1, 0.2, 0.3, 0.5, 0.7]),
        (lenet.NORM, norm, test),
        (lenet.CONTROL, 0.8, [0.1, 0.2, 0.3, 0.5, control]),
    )
    for variant, train, accuracy in sides:
        for seed in range(seeds):
            value = train[seed] if isinstance(train, list) else train
            records[variant, seed] = {
                "train_accuracy": [0.1] * 4 + [value],
                "test_accuracy": accuracy,
                "train_loss": [2.3] * 4 + [loss],
                "final_test": accuracy[-1],
            }
    return Results(records, load("digits"), BUDGET, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(norm=0.82), "does not hold"),
        (planted(control=0.85), "does not hold"),  # the other rate would have been better
        (planted(test=STEADY), "does not hold"),
        (planted(norm=[0.9, 0.8, 0.9]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
        (planted(norm=0.1, test=[0.1] * 5, loss=None), "does not hold"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert lenet.judge(results).status == status
    lenet.present(results)


def test_only_falls_in_the_later_half_bounce():
    assert lenet.falls(STEADY) == 0
    assert lenet.falls([0.9, 0.1, 0.2, 0.3]) == pytest.approx(0)
    # Steps from 4 to 5, 5 to 6 and so on: +10, -10, +10, of which one falls.
    assert lenet.falls([0.9, 0.7, 0.7, 0.8, 0.7, 0.8]) == pytest.approx(10 / 3)
    assert lenet.falls([0.9]) == 0


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(lenet.EXPERIMENT.budgets, "quick", {**BUDGET, "seeds": 1, "epochs": 2})
    experiment = find("lenet")
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 1
    assert "not the reports' data" in text
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert len(results.records[lenet.NORM, 0]["test_accuracy"]) == 2

import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import multi_device
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(plain=0.5, synchronized=1e-15, apart=0.90, together=0.95, single=0.95, seeds=MIN_SEEDS):
    """Results with these errors of the weights and final accuracies; a list has a value a seed."""

    def record(accuracy, seed, *errors):
        value = accuracy[seed] if isinstance(accuracy, list) else accuracy
        return {"test_accuracy": [0.1, value], "errors": [0.0, *errors]}

    records = {}
    for seed in range(seeds):
        records["single", seed] = {"single": record(single, seed)}
        records["devices", seed] = {
            "plain": record(apart, seed, plain),
            "synchronized": record(together, seed, synchronized),
        }
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(synchronized=0.0), "holds"),
        (planted(plain=1e-3), "does not hold"),
        (planted(synchronized=1e-3), "does not hold"),
        (planted(apart=0.95), "does not hold"),
        (planted(together=0.90), "does not hold"),
        (planted(together=0.99), "does not hold"),
        (planted(apart=[0.90, 0.95, 0.90]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert multi_device.judge(results).status == status


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "train_images": 80, "test_images": 40}
    monkeypatch.setitem(multi_device.EXPERIMENT.budgets, "quick", budget)
    monkeypatch.setattr(multi_device, "DEVICES", 2)
    experiment = find("multi-device")
    results = run(experiment, out=tmp_path)
    verdict, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    assert "on 2 devices" in verdict.sentence
    found = results.records["devices", 0]
    assert max(found["synchronized"]["errors"]) < 1e-12 < min(found["plain"]["errors"])
    alone = results.records["single", 0]["single"]
    assert found["synchronized"]["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-10)

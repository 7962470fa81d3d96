import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import weight_decay as wd
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(plain, norm, seeds=MIN_SEEDS):
    """Results with these final accuracies, a value a decay; a list has one a seed."""
    records = {}
    for side, values in ((wd.PLAIN, plain), (wd.NORM, norm)):
        for decay, value in zip(wd.DECAYS, values, strict=True):
            for rate in wd.RATES:
                for seed in range(seeds):
                    accuracy = value[seed] if isinstance(value, list) else value
                    record = {"final_test": accuracy, "final_train": 0.9, "weights": 10.0}
                    records[wd._name(side, decay, rate), seed] = record
    return Results(records, load("digits"), {"epochs": 2, "train_images": 768}, seeds)


NEEDS = (0.7, 0.7, 0.75, 0.9, 0.5)  # best at 0.05: a fifth of it is 0.01


@pytest.mark.parametrize(
    ("plain", "norm", "status"),
    [
        (NEEDS, (0.9, 0.9, 0.9, 0.9, 0.9), "holds"),
        (NEEDS, (0.7, 0.7, 0.7, 0.7, 0.7), "does not hold"),  # far below the plain network
        (NEEDS, (0.9, 0.9, 0.9, 0.95, 0.9), "does not hold"),  # all of it is better still
        (NEEDS, (0.9, 0.9, [0.95, 0.86, 0.9], 0.9, 0.9), "inconclusive"),
        ((0.9,) * 5, (0.9,) * 5, "inconclusive"),  # nothing to reduce
    ],
)
def test_the_verdict_follows_the_data(plain, norm, status):
    assert wd.judge(planted(plain, norm)).status == status


def test_too_few_seeds_decide_nothing_and_the_sentence_names_the_decay():
    assert wd.judge(planted(NEEDS, (0.9,) * 5, seeds=2)).status == "inconclusive"
    sentence = wd.judge(planted(NEEDS, (0.7,) * 5)).sentence
    assert "best weight decay (0.05) wins it 20 points" in sentence
    assert "20 points worse than the plain network at its best" in sentence
    assert "too little to reduce" in wd.judge(planted((0.9,) * 5, (0.9,) * 5)).sentence


def test_a_share_of_the_labels_is_drawn_anew():
    data = load("digits")
    noisy = wd.with_random_labels(data, 0.3, seed=1)
    changed = (noisy.train_y != data.train_y).float().mean().item()
    # A tenth of the drawn labels is the right one; 1,437 draws have a standard error of 1.2 %.
    assert changed == pytest.approx(0.27, abs=0.05)
    assert torch.equal(noisy.test_y, data.test_y)
    assert torch.equal(noisy.train_y, wd.with_random_labels(data, 0.3, seed=1).train_y)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "train_images": 64, "test_images": 100}
    experiment = find("weight-decay")
    monkeypatch.setitem(experiment.budgets, "quick", budget)
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    record = results.records["batch-wd0.05-lr0.1", 0]
    assert set(record) == {"final_train", "final_test", "train_loss", "weights"}

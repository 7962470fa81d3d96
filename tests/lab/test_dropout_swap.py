import pytest
from torch import nn

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import dropout_swap
from normally.lab.networks import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

BUDGET = {"epochs": 2, "steps": 2, "batch_size": 64, "train_images": 256, "test_images": 64}


def planted(train=0.827, test=0.763, seeds=MIN_SEEDS, loss=0.486):
    """What was reported; a list has a value a seed."""
    records = {}
    for variant in dropout_swap.NETWORKS:
        for seed in range(seeds):
            swapped = (train, test[seed] if isinstance(test, list) else test)
            final = (0.901, 0.861) if variant == dropout_swap.NORM else swapped
            records[variant, seed] = {
                "final_train": final[0],
                "final_test": final[1],
                "train_accuracy": [0.1, final[0] - 0.1],
                "test_accuracy": [0.1, final[1]],
                "train_loss": [2.3, loss],
            }
    return Results(records, load("digits"), BUDGET, seeds)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "holds"),
        ({"train": 0.88}, "does not hold"),
        ({"test": 0.85}, "does not hold"),
        ({"test": [0.86, 0.7, 0.86]}, "inconclusive"),
        ({"seeds": 2}, "inconclusive"),
        ({"train": 0.1, "test": 0.1, "loss": None}, "holds"),
    ],
)
def test_the_verdict_follows_the_data(changed, status):
    results = planted(**changed)
    assert dropout_swap.judge(results).status == status
    dropout_swap.present(results)


def test_the_sides_differ_in_the_dense_part_alone():
    kinds = {
        variant: [type(m).__name__ for m in lenet(8, **options)]
        for variant, options in dropout_swap.NETWORKS.items()
    }
    dropouts = {v: names.count("Dropout") for v, names in kinds.items()}
    assert dropouts == {"norm": 0, "swap": 2, "control": 0, "dropout-alone": 2}
    norms = {v: sum("BatchNorm" in n for n in names) for v, names in kinds.items()}
    assert norms == {"norm": 4, "swap": 2, "control": 2, "dropout-alone": 0}
    swap = lenet(8, **dropout_swap.NETWORKS["swap"])
    assert all(m.p == 0.5 for m in swap if isinstance(m, nn.Dropout))


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(dropout_swap.EXPERIMENT.budgets, "quick", {**BUDGET, "seeds": 1})
    experiment = find("dropout-swap")
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 1
    assert "0.486" in text  # a reported number
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"

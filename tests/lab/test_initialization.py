import pytest
import torch

from normally.lab import Results, conclude, data, find, run
from normally.lab.experiment import Run
from normally.lab.experiments import initialization
from normally.lab.experiments.initialization import RATES, SCALES, SIDES
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(norm, plain, seeds=MIN_SEEDS):
    """Final accuracy at scale 100 by side, and 0.95 at all other scales, at rate 0.3."""
    records = {}
    for seed in range(seeds):
        for side in SIDES:
            for scale in SCALES:
                for rate in RATES:
                    value = {"plain": plain, "norm": norm, "hidden": 0.95}[side]
                    value = value[seed] if isinstance(value, list) else value
                    value = 0.95 if scale != 100 else value
                    if rate != 0.3:  # no good at scale 1, the best elsewhere: may not be taken
                        value = 0.2 if scale == 1 else 0.99
                    name = initialization._name(side, scale, rate)
                    records[name, seed] = {"test_accuracy": [0.1, value], "moved": None}
    return Results(records, data.load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(norm=0.94, plain=0.1), "holds"),
        (planted(norm=0.80, plain=0.1), "does not hold"),
        (planted(norm=0.94, plain=0.90), "does not hold"),  # the plain network does not care either
        (planted(norm=[0.95, 0.93, 0.90], plain=0.1), "inconclusive"),
        (planted(norm=0.94, plain=0.1, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert initialization.judge(results).status == status


@pytest.mark.parametrize(("side", "scaled"), [("plain", 5), ("norm", 5), ("hidden", 4)])
def test_the_weights_are_scaled(side, scaled, monkeypatch):
    sizes = {}

    def fit(model, *args, lr, **kwargs):
        weights = [p for p in model.parameters() if p.dim() > 1]
        sizes[lr] = torch.stack([p.detach().norm() for p in weights])
        return {"test_accuracy": [0.0]}

    monkeypatch.setattr(initialization, "fit", fit)
    # The rate tells the two calls apart.
    for scale, rate in ((1, 1), (10, 2)):
        torch.manual_seed(101)
        variant = f"{side}-x{scale}-lr{rate}"
        cell = Run(variant, 101, data.load("digits"), {"epochs": 1, "batch_size": 64})
        assert initialization.measure(cell)["moved"] == 0
    expected = torch.tensor([10.0] * scaled + [1.0] * (5 - scaled))
    torch.testing.assert_close(sizes[2.0] / sizes[1.0], expected)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 1400}
    monkeypatch.setitem(initialization.EXPERIMENT.budgets, "quick", budget)
    experiment = find("initialization")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert results.records["norm-x1-lr0.3", 0]["moved"] > 0

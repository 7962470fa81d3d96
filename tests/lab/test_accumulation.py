import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import accumulation
from normally.lab.networks import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(plain=0.5, layer=0.0, exact=1e-15, trained=0.90, seeds=MIN_SEEDS):
    """Results with these errors, and with plain accumulation's final accuracy, a list by seed."""
    errors = {"plain": plain, "layer-plain": layer, "exact": exact}
    records = {}
    for variant in accumulation.VARIANTS:
        for seed in range(seeds):
            final = trained[seed] if isinstance(trained, list) else trained
            accuracy = final if variant == "plain" else 0.95
            error = errors.get(variant, 0.0)
            records[variant, seed] = {"error": error, "test_accuracy": [0.1, accuracy]}
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(plain=0.01), "does not hold"),
        (planted(layer=0.01), "does not hold"),  # then it is not batch norm
        (planted(exact=0.01), "does not hold"),  # then it is not the statistics
        (planted(trained=0.95), "does not hold"),
        (planted(trained=[0.9, 0.95, 0.9]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert accumulation.judge(results).status == status


def test_the_error_of_a_gradient():
    data = load("digits").first(64, 1)
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    assert accumulation.gradient_error(model, data, "large", 64) == 0
    assert accumulation.gradient_error(model, data, "plain", 64) == 0  # one micro-batch: the same
    assert accumulation.gradient_error(model, data, "exact", 4) < 1e-12
    assert accumulation.gradient_error(model, data, "plain", 4) > 0.05
    assert accumulation.gradient_error(lenet(8, norm="layer"), data, "plain", 4) < 1e-12
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("way", ["large", "plain", "statistics", "exact", "small"])
def test_an_epoch_moves_the_statistics_as_often_as_its_way_says(way):
    data = load("digits").first(150, 1)  # two large batches; the rest is left out
    model = lenet(8, norm="batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    micro = accumulation.BATCH if way == "large" else 16
    batch = 16 if way == "small" else accumulation.BATCH
    accumulation._epoch(model, optimizer, data, way, micro, batch)
    updates = {"large": 2, "plain": 8, "statistics": 2, "exact": 2, "small": 8}
    assert model[1].num_batches_tracked == updates[way]


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(accumulation.EXPERIMENT.budgets, "quick", {"seeds": 1, "epochs": 1})
    monkeypatch.setattr(accumulation, "MICRO", 32)
    ways = {k: (norm, way, max(size, 32)) for k, (norm, way, size) in WAYS.items()}
    monkeypatch.setattr(accumulation, "VARIANTS", ways)
    experiment = find("accumulation")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    assert "error" not in results.records["small", 0]


WAYS = dict(accumulation.VARIANTS)

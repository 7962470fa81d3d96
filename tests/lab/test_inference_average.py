import math

import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import inference_average
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(constant, decayed, seeds=MIN_SEEDS):
    """Results in which recalibrating gains so many points over each momentum, or a list by seed."""
    records = {}
    for variant in inference_average.EXPERIMENT.variants:
        gained = constant if variant.endswith("constant") else decayed
        for seed in range(seeds):
            points = gained[seed] if isinstance(gained, list) else gained
            accuracy = dict.fromkeys(inference_average.LABELS, 0.9)
            accuracy |= dict.fromkeys(inference_average.MOMENTA, 0.9 - points / 100)
            records[variant, seed] = {"accuracy": accuracy}
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(2.0, 1.0), "holds"),
        (planted(2.0, 0.0), "does not hold"),
        (planted(0.0, 2.0), "does not hold"),
        (planted(-3.0, 2.0), "does not hold"),
        (planted(2.0, [1.0, 0.0, 1.0]), "inconclusive"),
        (planted(2.0, 1.0, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    verdict = inference_average.judge(results)
    assert verdict.status == status


def test_algorithm_2_averages_means_and_unbiased_variances():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(norm)
    batches = torch.randn(4, 5, 3).unbind()
    model(torch.full((2, 3), 1e3))  # must be forgotten
    inference_average.algorithm_2(model, batches)
    expected = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean(0))


def test_the_distance_is_in_standard_deviations():
    model, truth = (torch.nn.Sequential(torch.nn.BatchNorm1d(2, eps=0.0)) for _ in range(2))
    truth[0].running_mean.copy_(torch.tensor([1.0, 2.0]))
    truth[0].running_var.copy_(torch.tensor([4.0, 9.0]))
    assert inference_average.distance(truth, truth) == (0, 0)
    model[0].running_mean.copy_(torch.tensor([3.0, 5.0]))
    model[0].running_var.copy_(torch.tensor([4.0, 9.0]) * math.e**2)
    assert inference_average.distance(model, truth) == pytest.approx((1, 1))


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 2, "batch_size": 256}
    monkeypatch.setitem(inference_average.EXPERIMENT.budgets, "quick", budget)
    experiment = find("inference-average")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    for record in results.records.values():
        assert record["same_weights"]
        assert record["shift"]["recalibrated"] == 0
        assert record["shift"]["0.1"] > record["shift"]["algorithm-2"] > 0


def test_a_seed_draws_the_same_training_for_every_momentum():
    data = load("digits").first(256, 64)
    budget = {"epochs": 1, "batch_size": 64}
    cell = inference_average.Run("relu-decayed", 0, data, budget)
    weights = []
    for momentum in inference_average.MOMENTA:
        torch.manual_seed(3)
        weights.append(inference_average._weights(*inference_average._ends(cell, momentum)))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])

import copy

import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import train_eval
from normally.lab.networks import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

CALM = [0.1, 0.5, 0.9, 0.91, 0.9, 0.91]
# Only the second half, the last three, counts.
WILD = [0.1, 0.5, 0.9, 0.91, 0.7, 0.91]


def planted(running, recalibrated, own, seeds=MIN_SEEDS):
    """Results with these curves for every seed, or a list of curves, one a seed."""

    def row(curves, seed):
        return curves[seed] if isinstance(curves[0], list) else curves

    records = {
        (variant, seed): {
            "running": row(running, seed),
            "frozen": CALM,
            "recalibrated": row(recalibrated, seed),
            "own": row(own, seed),
        }
        for variant in train_eval.VARIANTS
        for seed in range(seeds)
    }
    return Results(records, load("digits"), {"epochs": len(CALM)}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(WILD, CALM, CALM), "holds"),
        (planted(WILD, WILD, WILD), "does not hold"),  # it is the weights
        (planted(CALM, CALM, CALM), "does not hold"),
        (planted(WILD, CALM, [0.9] * 6), "does not hold"),  # recalibrating leaves too much
        (planted([WILD, WILD, CALM], CALM, CALM), "inconclusive"),
        (planted(WILD, CALM, CALM, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert train_eval.judge(results).status == status


def test_fluctuation_is_that_of_the_second_half_in_points():
    expected = ((3**2 + 4**2) / 2) ** 0.5
    assert train_eval.fluctuation([0.0, 0.9, 0.5, 0.53, 0.49]) == pytest.approx(expected)
    assert train_eval.fluctuation([0.0, 0.9, 0.0, 0.5, 0.53, 0.49]) == pytest.approx(expected)
    assert train_eval.fluctuation([0.5]) == 0


def test_the_shares_of_both_parts_add_to_one():
    running, recalibrated = torch.rand(2, 10).tolist()
    part = [a - b for a, b in zip(running, recalibrated, strict=True)]
    both = train_eval.share(running, recalibrated) + train_eval.share(running, part)
    assert both == pytest.approx(1)
    assert train_eval.share(running, running) == 0
    assert train_eval.share(running, [0.5] * 10) == pytest.approx(1)
    assert train_eval.share([0.5] * 10, running) == 0  # nothing to explain


@pytest.mark.parametrize("kind", train_eval.STATISTICS)
def test_an_evaluation_leaves_the_training_alone(kind):
    data = load("digits").first(256, 64)
    model = lenet(8)
    model(data.train_x)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train_eval._accuracy(model, data, kind, 32)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_average_is_collected_again_and_the_weights_stay():
    data = load("digits").first(320, 64)
    model = lenet(8)
    weights = [p.clone() for p in model.parameters()]
    norm = model[1]
    norm.running_mean.fill_(1e3)
    train_eval._average_again(model, data, 32)
    assert norm.num_batches_tracked == 10
    assert 0.9**10 * 1e3 - 5 < norm.running_mean.mean() < 0.9**10 * 1e3 + 5
    for weight, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(weight, before)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 4, "batch_size": 256}
    monkeypatch.setitem(train_eval.EXPERIMENT.budgets, "quick", budget)
    experiment = find("train-eval")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    assert "recalibrated" not in results.records["relu-plain", 0]

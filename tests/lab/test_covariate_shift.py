import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import covariate_shift as shift
from normally.lab.networks import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def record(moved, shifted, accuracy):
    return {
        "moved": [[moved] * 4] * 2,
        "from_end": [[moved] * 4] * 3,
        "shift": [shifted, shifted],
        "relative": [shifted] * 4,
        "absolute": [1.0] * 4,
        "cosine": [0.5] * 4,
        "train_accuracy": [accuracy, accuracy],
        "train_loss": [1.0, 1.0],
        "test_accuracy": [0.5, accuracy],
    }


def planted(plain=(0.2, 0.6, 0.8), norm=(0.05, 0.2, 0.98), noisy=(0.4, 1.0, 0.8), seeds=MIN_SEEDS):
    """Movement, shift and training accuracy of the sides; a list has a value a seed."""
    records = {}
    for variant in shift.EXPERIMENT.variants:
        values = {"plain": plain, "norm": norm, "noisy": noisy}[variant.partition("-")[0]]
        for seed in range(seeds):
            one = [v[seed] if isinstance(v, list) else v for v in values]
            records[variant, seed] = record(*one)
    return Results(records, load("digits"), {"epochs": 2, "every": 5}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(noisy=(0.4, 1.0, 0.97)), "does not hold"),  # the benefit stays
        (planted(plain=(0.05, 0.6, 0.8)), "does not hold"),  # inputs move as much with BN
        (planted(plain=(0.2, 0.2, 0.8)), "does not hold"),  # gradients shift as much
        (planted(plain=(None, None, 0.1)), "inconclusive"),  # diverged: noise moves less than that
        (planted(norm=(None, None, 0.1)), "does not hold"),
        (planted(noisy=(0.1, 1.0, 0.97)), "inconclusive"),  # the noise puts too little back
        (planted(plain=(0.2, 0.6, 0.99)), "inconclusive"),  # no benefit to lose
        (planted(noisy=(0.4, 1.0, [0.8, 0.97, 0.9])), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert shift.judge(results).status == status


def test_noise_has_its_mean_and_spread_and_is_silent_in_evaluation():
    layer, x = shift.Noise(0), torch.randn(20_000, 3)
    one, two = layer(x), layer(x)
    # 20,000 values: a mean is known to 0.01, and the spread of 3 units is drawn anew each time.
    for y in (one, two):
        assert (y.mean(0).abs() < shift.MEAN + 0.05).all()
        assert (y.std(0) > 0.97).all()
        assert (y.std(0) < shift.SPREAD + 0.05).all()
    assert ((one.mean(0) - two.mean(0)).abs() > 0.02).all()
    assert torch.equal(layer.eval()(x), x)


def test_the_noisy_network_starts_from_the_same_weights_and_draws_from_its_own_source():
    torch.manual_seed(0)
    model = lenet(8, norm="batch")
    noise = shift.noisy(model, 3)
    assert [type(layer).__name__ for layer in noise].count("Noise") == 4
    assert [type(layer).__name__ for layer in noise].count("ReLU") == 4
    x, state = torch.randn(16, 1, 8, 8), torch.get_rng_state()
    assert not torch.equal(noise(x), noise(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise[0].weight, model[0].weight)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 2, "batch_size": 256, "every": 3}
    monkeypatch.setitem(shift.EXPERIMENT.budgets, "quick", budget)
    experiment = find("covariate-shift")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    measured = results.records["noisy-lr0.1", 0]
    assert len(measured["moved"]) == 2
    assert len(measured["from_end"]) == 3
    assert measured["from_end"][-1] == [0.0] * 4
    assert [len(measured[key]) for key in ("relative", "absolute", "cosine")] == [4, 4, 4]

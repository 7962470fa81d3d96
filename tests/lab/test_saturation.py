import pytest
import torch

from normally.lab import Results, conclude, data, find, run
from normally.lab.experiments import saturation
from normally.lab.experiments.saturation import DEEP, NAMES, RATES, SHALLOW, SIDES
from normally.lab.networks import mlp
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(plain=0.4, norm=0.01, plain_ratio=1e-4, norm_ratio=1.0, tanh=None, seeds=MIN_SEEDS):
    """Shares of saturated units and ratios of gradients at rate 1, for tanh others if given."""
    records = {}
    for seed in range(seeds):
        for side in SIDES:
            for activation in NAMES:
                for depth in (SHALLOW, DEEP):
                    share, ratio = (plain, plain_ratio) if side == "plain" else (norm, norm_ratio)
                    if activation == "tanh" and side == "plain" and tanh is not None:
                        share, ratio = tanh
                    share = share[seed] if isinstance(share, list) else share
                    for rate in RATES:
                        # At the other rates nothing is saturated, but they are worse.
                        records[saturation._name(side, activation, depth, rate), seed] = {
                            "epochs": [0, 1],
                            "saturated": [[0.0] * depth, [share if rate == 1 else 0.0] * depth],
                            "gradient": [[ratio, *[1.0] * (depth - 1)]] * 2,
                            "test_accuracy": [0.1, 0.9 if rate == 1 else 0.5],
                        }
    return Results(records, data.load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(plain=0.05), "does not hold"),
        (planted(norm=0.2), "does not hold"),
        (planted(plain_ratio=0.5), "does not hold"),
        (planted(norm_ratio=0.01), "does not hold"),
        (planted(norm_ratio=None), "does not hold"),  # not a number: diverged
        (planted(norm_ratio=0.0), "does not hold"),
        (planted(tanh=(0.05, 1e-4)), "does not hold"),
        (planted(tanh=(0.4, 0.5)), "does not hold"),
        (planted(plain=[0.05, 0.4, 0.4]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert saturation.judge(results).status == status


@pytest.mark.parametrize(("activation", "edge"), [("sigmoid", 3.637), ("tanh", 1.819)])
def test_the_probe_counts_units_on_the_flat_ends(activation, edge):
    # Slopes of 10 % of the largest, by hand: σ(z)·σ(−z) = 1/40 and 1 − tanh²(z) = 1/10.
    model = mlp(1, [4], norm="none", activation=activation)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [edge - 0.01], [edge + 0.01], [-edge - 0.01]]))
    y = torch.tensor([0])
    saturated, gradient = saturation.probe(model, activation, torch.ones(1, 1, 1, 1), y)
    assert saturated == [0.5]
    assert len(gradient) == 1
    nan = torch.full((1, 1, 1, 1), float("nan"))
    assert saturation.probe(model, activation, nan, y)[0] == [1.0]


def test_the_probe_leaves_the_model_as_it_is():
    torch.manual_seed(101)
    model = mlp(4, [3, 3], activation="tanh").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saturation.probe(model, "tanh", torch.randn(8, 1, 2, 2), torch.randint(10, (8,)))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 1400}
    monkeypatch.setitem(saturation.EXPERIMENT.budgets, "quick", budget)
    experiment = find("saturation")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    record = results.records["norm-tanh-8-lr1", 0]
    assert record["epochs"] == [0, 1]
    assert [len(row) for row in record["saturated"]] == [8, 8]

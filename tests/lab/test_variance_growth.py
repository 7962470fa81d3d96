import math

import pytest
import torch

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import variance_growth
from normally.lab.experiments.variance_growth import NETWORKS, THEORY
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

DEPTH, WIDTHS = 20, (16, 64)


def planted(unit=1.0, scaled=1.0, still=1.0, linear=1.0, relu=1.0, seeds=MIN_SEEDS):
    """Exact powers: growth a layer / √n, growth, the std, the gradient's growth over all layers."""
    records = {}
    for seed in range(seeds):
        for network in NETWORKS:
            std, gradient = {}, {}
            for width in WIDTHS:
                step = {"unit": unit * math.sqrt(width), "scaled": scaled}.get(network, 1.0)
                level = still if "norm" in network else 1.0
                total = {"norm": linear, "relu-norm": relu}.get(network, 1.0)
                total = total[seed] if isinstance(total, list) else total
                std[str(width)] = [level * step**layer for layer in range(DEPTH)]
                gradient[str(width)] = [
                    None if total is None else total ** (1 - layer / (DEPTH - 1))
                    for layer in range(DEPTH)
                ]
            if total is None:
                gradient[str(WIDTHS[-1])][-1] = 1.0
            records[network, seed] = {"std": std, "gradient": gradient}
    return Results(records, load("generated"), {"depth": DEPTH, "widths": WIDTHS}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(unit=1.2), "does not hold"),
        (planted(unit=0.8), "does not hold"),
        (planted(scaled=0.8), "does not hold"),
        (planted(still=1.1), "does not hold"),
        (planted(still=0.9), "does not hold"),
        (planted(linear=1e-2), "does not hold"),
        (planted(relu=40.0), "does not hold"),
        (planted(relu=[3.0, 9.0, 30.0]), "inconclusive"),
        (planted(relu=None), "does not hold"),  # beyond the largest number
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert variance_growth.judge(results).status == status


def test_the_walk_finds_the_growth_that_theory_knows():
    torch.manual_seed(101)
    x, y = torch.randn(256, 64, dtype=torch.float64), torch.randint(10, (256,))

    def growth(network):
        layers = variance_growth._walk(x, y, 256, 10, network)
        signal, gradient = [h.std().item() for h in layers], [h.grad.norm().item() for h in layers]
        return (signal[-1] / signal[0]) ** (1 / 9), (gradient[0] / gradient[-1]) ** (1 / 9)

    # 3 % a layer: a layer's n weights give its size to 1/√(2n), 4 %, and nine layers average.
    assert growth("unit") == pytest.approx((16, 16), rel=0.03)
    assert growth("scaled") == pytest.approx((1, 1), rel=0.03)
    assert growth("relu-he") == pytest.approx((1, 1), rel=0.03)
    assert growth("relu-norm") == pytest.approx((1, THEORY), rel=0.03)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "depth": 3, "widths": [4, 8], "batch_size": 16}
    monkeypatch.setitem(variance_growth.EXPERIMENT.budgets, "quick", budget)
    experiment = find("variance-growth")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert [len(row) for row in results.records["norm", 0]["gradient"].values()] == [3, 3]

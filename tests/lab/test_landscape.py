import math

import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import landscape
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

MEASURES = ("loss_range", "gradient_change", "beta", "beta_at_distance")


def record(rate, *, loss=(1.0, 1.0, 0.3, 0.3), **sizes):
    return {
        "step": list(range(len(loss))),
        "loss": list(loss),
        "gradient": [1.0] * len(loss),
        **{key: [sizes.get(key, 1.0)] * len(loss) for key in MEASURES},
        "test_accuracy": [0.1, 0.9 if rate == 0.3 else 0.5],
        "train_loss": [1.0, 0.5],
    }


def planted(seeds=MIN_SEEDS, same=None, tuned=None, plain_loss=None):
    """Measures of the plain side at SAME and at its tuned rate, 0.3; a list has one a seed."""
    records = {}
    for variant in landscape.EXPERIMENT.variants:
        side, _, rate = variant.partition("-lr")
        for seed in range(seeds):
            sizes = {}
            if side == "plain":
                chosen = {landscape.SAME: same, 0.3: tuned}.get(float(rate)) or {}
                sizes = {k: v[seed] if isinstance(v, list) else v for k, v in chosen.items()}
            loss = plain_loss if plain_loss and side == "plain" else (1.0, 1.0, 0.3, 0.3)
            records[variant, seed] = record(float(rate), loss=loss, **sizes)
    return Results(records, load("digits"), {"epochs": 2}, seeds)


ROUGH = dict.fromkeys(MEASURES, 3.0)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(same=ROUGH, tuned=ROUGH), "holds"),
        (planted(same=ROUGH, tuned=dict.fromkeys(MEASURES)), "holds"),  # diverged: bad for plain
        (planted(same=ROUGH, tuned={**ROUGH, "beta": 1.0}), "does not hold"),
        (planted(same={**ROUGH, "loss_range": 1.2}, tuned=ROUGH), "does not hold"),
        (planted(same={**ROUGH, "beta_at_distance": 1.0}, tuned=ROUGH), "does not hold"),
        (planted(same={**ROUGH, "beta": [1.0, 2.0, 9.0]}, tuned=ROUGH), "inconclusive"),
        (planted(same=ROUGH, tuned=ROUGH, plain_loss=(9.0, 9.0, 5.0, 5.0)), "inconclusive"),
        (planted(same=ROUGH, tuned=ROUGH, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert landscape.judge(results).status == status


def test_a_diverged_network_with_batch_norm_counts_against_it():
    results = planted(same=ROUGH, tuned=ROUGH)
    for seed in range(MIN_SEEDS):
        results.records[f"norm-lr{landscape.SAME:g}", seed]["beta"] = [None] * 4
    assert landscape.judge(results).status == "does not hold"


def test_equal_loss_compares_bins_that_both_sides_have():
    plain, norm = record(0.1, loss=(1.0, 1.0, 0.3, 9.0)), record(0.1)
    assert landscape._by_loss(plain) == {4: 1.0}
    assert landscape._by_loss(norm) == {4: 1.0, 2: 1.0}
    assert landscape._by_loss({**plain, "loss": [None] * 4}) == {}


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 256, "every": 3}
    monkeypatch.setitem(landscape.EXPERIMENT.budgets, "quick", budget)
    experiment = find("landscape")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 3
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert len(result["verdict"]["criteria"]) == 7
    measured = results.records["norm-lr0.1", 0]
    assert measured["step"] == [0, 3]
    for key in MEASURES:
        assert len(measured[key]) == 2
        assert all(value > 0 and math.isfinite(value) for value in measured[key])

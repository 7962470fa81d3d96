import pytest

from normally.lab import Results, conclude, data, find, run
from normally.lab.experiments import gamma_beta
from normally.lab.experiments.gamma_beta import FORMS
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(gamma=1.5, beta=0.1, first_beta=0.3, elsewhere=None, seeds=MIN_SEEDS):
    """All channels of the last layer alike; `elsewhere`: γ and β from the other start."""
    records = {}
    for seed in range(seeds):
        for form in FORMS:
            g, b = (gamma, beta) if form == "usual" or elsewhere is None else elsewhere
            g = g[seed] if isinstance(g, list) else g
            after = {"gamma": [[1.0], [g] * 4], "beta": [[first_beta], [b, b, b, b]]}
            before = {"gamma": [[1.0], [4.0] * 4], "beta": [[0.0], [1.0] * 4]}
            records[form, seed] = {"test_accuracy": [0.9], "before": before, "after": after}
    return Results(records, data.load("digits"), {"epochs": 1}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(gamma=0.9, elsewhere=(1.5, 0.1)), "does not hold"),
        (planted(gamma=2.1, elsewhere=(1.5, 0.1)), "does not hold"),
        (planted(beta=-0.26, elsewhere=(1.5, 0.1)), "does not hold"),
        (planted(first_beta=0.05), "does not hold"),  # larger with depth
        (planted(elsewhere=(3.0, 0.1)), "does not hold"),  # γ stays where it starts
        (planted(elsewhere=(1.5, 0.9)), "does not hold"),
        (planted(elsewhere=(None, None)), "does not hold"),  # diverged
        (planted(elsewhere=([1.5, 1.5, 3.0], 0.1)), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert gamma_beta.judge(results).status == status


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 512}
    monkeypatch.setitem(gamma_beta.EXPERIMENT.budgets, "quick", budget)
    experiment = find("gamma-beta")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    usual, elsewhere = (results.records[form, 0] for form in ("usual", "elsewhere"))
    assert [len(layer) for layer in usual["after"]["gamma"]] == [6, 16, 120, 84]
    assert {v for layer in usual["before"]["gamma"] for v in layer} == {1.0}
    gammas = [v for layer in elsewhere["before"]["gamma"] for v in layer]
    assert 0.25 <= min(gammas) < 0.5
    assert 2 < max(gammas) <= 4
    # Two quarters of the range of ln γ, 226 channels: a half and 4 standard deviations.
    assert 0.37 < sum(0.5 <= g <= 2 for g in gammas) / len(gammas) < 0.63

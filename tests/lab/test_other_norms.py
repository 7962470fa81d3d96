import pytest
import torch
from torch.nn import functional as F

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import other_norms
from normally.lab.networks import lenet
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(batch=0.97, seeds=MIN_SEEDS, **others):
    """Final accuracies at the best rate, 0.95 for who is not named; a list has a value a seed."""
    records = {}
    for variant in other_norms.EXPERIMENT.variants:
        norm, _, rate = variant.partition("-lr")
        best = {"batch": batch, **others}.get(norm, 0.95)
        for seed in range(seeds):
            value = best[seed] if isinstance(best, list) else best
            final = value if rate == "0.3" else 0.5
            records[variant, seed] = {"test_accuracy": [0.1, final], "train_loss": [1.0, None]}
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(instance=0.975), "holds"),  # ahead, but by less than the margin
        (planted(instance=0.99), "does not hold"),
        (planted(none=0.99), "does not hold"),
        (planted(batch=0.1), "does not hold"),  # diverged
        (planted(rms=[0.96, 0.99, 0.97]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert other_norms.judge(results).status == status


@pytest.mark.parametrize("norm", other_norms.NORMS)
def test_all_start_from_the_same_weights_and_draw_the_same_next(norm):
    torch.manual_seed(0)
    plain, expected = lenet(8, norm="none"), torch.rand(1)
    torch.manual_seed(0)
    model = other_norms.normalized_lenet(8, norm)
    assert torch.equal(torch.rand(1), expected)
    assert len(model) == len(plain) + (0 if norm == "none" else 2)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_each_norm_is_over_what_its_name_says():
    x = torch.randn(4, 6, 5, 5)
    rms = x / x.square().mean((1, 2, 3), keepdim=True).sqrt()
    expected = {
        "batch": F.batch_norm(x, None, None, training=True),
        "layer": F.layer_norm(x, (6, 5, 5)),
        "group": F.group_norm(x, 2),
        "instance": F.instance_norm(x),
        "rms": rms,
        "lrn": F.local_response_norm(x, 5),
    }
    for norm, value in expected.items():
        (layer,) = other_norms.behind(norm, 6, 5)
        torch.testing.assert_close(layer(x), value, rtol=1e-4, atol=1e-4)  # float32 rounding
    assert other_norms.behind("instance", 6, 5)[0].weight is not None


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "batch_size": 512}
    monkeypatch.setitem(other_norms.EXPERIMENT.budgets, "quick", budget)
    experiment = find("other-norms")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert len(result["verdict"]["criteria"]) == 6

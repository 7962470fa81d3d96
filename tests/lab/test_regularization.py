import pytest
import torch
from torch import nn

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import regularization as reg
from normally.lab.networks import mlp
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

BUDGET = {"epochs": 1, "train_images": 64, "test_images": 64}
ACCURACY = {reg.PLAIN: 0.90, reg.DROPOUT: 0.92, reg.NOISY: 0.93, reg.NORM: 0.92, reg.SILENT: 0.91}


def planted(seeds=MIN_SEEDS, train=1.0, loss=0.2, **changed):
    """Test accuracy of each side at either rate; a list has a value a seed."""
    records = {}
    for variant in reg.EXPERIMENT.variants:
        side = variant.partition("-lr")[0]
        accuracy = (ACCURACY | changed)[side]
        for seed in range(seeds):
            records[variant, seed] = {
                "final_train": train if side == reg.NORM else 1.0,
                "final_test": accuracy[seed] if isinstance(accuracy, list) else accuracy,
                "test_loss": loss,
                "noise": 0.1 if "norm" in side else 0.0,
            }
    return Results(records, load("digits"), BUDGET, seeds)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "holds"),
        ({reg.SILENT: 0.92}, "does not hold"),
        ({reg.DROPOUT: 0.93}, "does not hold"),
        ({"train": 0.94}, "does not hold"),  # the gap is closed
        ({reg.SILENT: [0.91, 0.93, 0.91]}, "inconclusive"),
        ({"seeds": 2}, "inconclusive"),
        ({reg.NORM: 0.1, "train": 0.1, "loss": None}, "does not hold"),
    ],
)
def test_the_verdict_follows_the_data(changed, status):
    results = planted(**changed)
    assert reg.judge(results).status == status
    reg.present(results)


def test_statistics_are_of_groups_of_the_batch_or_of_all():
    torch.manual_seed(0)
    model = mlp(64, [8], norm="batch")
    images = torch.randn(100, 1, 8, 8)
    alone = torch.cat([model(images[i : i + 8]) for i in range(0, 32, 8)])
    torch.testing.assert_close(reg.forward(model, images, 8), alone)
    torch.testing.assert_close(reg.forward(model, images, 32), model(images[:32]))
    torch.testing.assert_close(reg.forward(model, images, reg.EVERY), model(images)[:32])


def test_without_the_batch_there_is_no_noise():
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    norm = mlp(64, [8], norm="batch")
    assert reg.noise(mlp(64, [8], norm="none"), images, 8) < 1e-10  # rounding of float32
    assert reg.noise(norm, images, reg.EVERY) < 1e-10
    assert reg.noise(norm, images, 8) > 2 * reg.noise(norm, images, 32) > 0


def test_noise_of_a_known_size():
    class Mean(nn.Module):
        """Adds the mean of the batch: for pairs of -1 and 1 that is -1, 0 or 1."""

        def forward(self, x):
            return x + x.mean(0)

    images = torch.tensor([[-1.0]] * 50 + [[1.0]] * 50)
    # The neighbour is either sign: the mean of the pair is x or 0, its variance 1/4. The mean over
    # draws is 1.5 x, of variance 2.25.
    assert reg.noise(Mean(), images, 2, draws=100) == pytest.approx(0.25 / 2.25, rel=0.05)


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(reg.EXPERIMENT.budgets, "quick", {**BUDGET, "seeds": 1})
    experiment = find("regularization")
    results = run(experiment, data="digits", out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 1
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"

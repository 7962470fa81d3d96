import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import batch_size
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS


def planted(seeds=MIN_SEEDS, usual=0.9, **changed):
    """Results with this final accuracy but for what `changed` says: batch_2=0.2, or one a seed."""
    records = {}
    for variant in batch_size.EXPERIMENT.variants:
        side, batch, _ = variant.split("-")
        for seed in range(seeds):
            value = changed.get(f"{side}_{batch[1:]}", 0.1 if (side, batch) == ALONE else usual)
            value = value[seed] if isinstance(value, list) else value
            records[variant, seed] = {"train_loss": [1.0], "test_accuracy": [0.1, value]}
    return Results(records, load("digits"), {"epochs": 2, "train_images": 800}, seeds)


ALONE = ("batch", "b1")


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(batch_2=0.3), "holds"),
        (planted(batch_2=0.3, layer_1=0.95), "holds"),
        (planted(), "does not hold"),  # at 2 nothing is lost
        (planted(batch_2=0.3, layer_2=0.3), "does not hold"),  # nor more than layer norm loses
        (planted(batch_2=0.3, batch_1=0.6), "does not hold"),  # it learns at 1
        (planted(batch_2=0.3, layer_1=0.8), "does not hold"),
        (planted(batch_2=0.3, group_2=0.8), "does not hold"),
        # Undertrained at 32, layer norm must still be as good at 1 as it was at its best.
        (planted(batch_2=0.3, layer_32=0.5, layer_1=0.8), "does not hold"),
        (planted(batch_2=[0.3, 0.89, 0.95]), "inconclusive"),
        (planted(batch_2=0.3, seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert batch_size.judge(results).status == status


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    budget = {"seeds": 1, "epochs": 1, "train_images": 128, "test_images": 40}
    monkeypatch.setitem(batch_size.EXPERIMENT.budgets, "quick", budget)
    experiment = find("batch-size")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    text = page.read_text("utf-8")
    assert text.count("<figure>") == 1
    assert text.count(f"{batch_size.REFUSED} when training") == 2  # normally's words and torch's
    assert read_json(page.parent / "result.json")["verdict"]["status"] == "inconclusive"
    # Convolutions alone take one image.
    assert "refused" not in results.records["conv-b1-r0.003", 0]


def test_another_error_is_not_taken_for_a_refusal(monkeypatch):
    def broken(*args, **options):
        raise ValueError("something else")

    monkeypatch.setattr(batch_size, "fit", broken)
    budget = {"epochs": 1, "train_images": 8, "test_images": 8}
    cell = batch_size.Run("batch-b1-r0.003", 0, load("digits"), budget)
    with pytest.raises(ValueError, match="something else"):
        batch_size.measure(cell)

import pytest

from normally.lab import Results, conclude, find, run
from normally.lab.data import load
from normally.lab.experiments import sequence
from normally.lab.storage import read_json
from normally.lab.verdict import MIN_SEEDS

GOOD = {
    "conv-none": 0.9,
    "conv-layer": 0.95,
    "conv-batch": 0.96,
    "conv-padded": 0.92,
    "gru-none": 0.9,
    "gru-layer": 0.95,
    "gru-batch": 0.9,
    "gru-steps": 0.8,
}


def planted(seeds=MIN_SEEDS, longer=None, changed=0.3, unchanged=0.0, **accuracies):
    """Accuracy by network and norm, and beyond training; a list has a value a seed."""
    accuracies = GOOD | {name.replace("_", "-"): value for name, value in accuracies.items()}
    longer = {"gru-layer": 0.8} if longer is None else longer
    records = {}
    for variant in sequence.EXPERIMENT.variants:
        name, _, rate = variant.rpartition("-lr")
        value = accuracies[name]
        for seed in range(seeds):
            final = value[seed] if isinstance(value, list) else value
            final = final if rate in ("0.3", "2") else 0.3
            records[variant, seed] = {
                "test_accuracy": [0.1, final],
                "train_loss": [2.0, 1.0],
                "by_length": [final] * 4 + [longer.get(name, 0.7)] * 3,
                "change_training": changed if name == "conv-padded" else unchanged,
                "change_evaluation": 0.0,
            }
    return Results(records, load("digits"), {"epochs": 2}, seeds)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        (planted(), "holds"),
        (planted(changed=None), "holds"),  # diverged: padding is to blame
        (planted(conv_batch=0.93), "does not hold"),  # behind layer norm
        (planted(gru_batch=0.95), "does not hold"),
        (planted(gru_steps=0.95), "does not hold"),  # either form of batch norm counts
        (planted(longer={"gru-layer": 0.7}), "does not hold"),
        (planted(gru_none=0.97), "does not hold"),  # layer norm does harm
        (planted(changed=1e-3), "does not hold"),
        (planted(unchanged=1e-3), "does not hold"),
        (planted(conv_padded=0.96), "does not hold"),
        (planted(gru_layer=0.1), "does not hold"),
        (planted(conv_padded=[0.92, 0.97, 0.92]), "inconclusive"),
        (planted(seeds=2), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_data(results, status):
    assert sequence.judge(results).status == status


def test_it_runs_judges_and_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sequence.EXPERIMENT.budgets, "quick", {"seeds": 1, "epochs": 1, "batch_size": 512}
    )
    monkeypatch.setattr(sequence, "LENGTHS", (8, 32))
    experiment = find("sequence")
    results = run(experiment, out=tmp_path)
    _, page = conclude(experiment, results, out=tmp_path)
    assert page.read_text("utf-8").count("<figure>") == 2
    result = read_json(page.parent / "result.json")
    assert result["verdict"]["status"] == "inconclusive"  # one seed decides nothing
    assert len(result["verdict"]["criteria"]) == 7
    assert results.records["conv-padded-lr0.1", 0]["change_training"] > 0
    assert results.records["conv-batch-lr0.1", 0]["change_training"] < 1e-6
    assert len(results.records["gru-steps-lr1", 0]["by_length"]) == 2

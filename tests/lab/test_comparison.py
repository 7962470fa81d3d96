import pytest

from normally.lab import Results, comparison
from normally.lab.data import load


def planted(**accuracies):
    records = {
        (variant, seed): {"test_accuracy": [0.0, value]}
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    }
    return Results(records, load("digits"), {"epochs": 2}, 3)


def test_a_learning_rate_is_chosen_by_the_other_seeds():
    results = planted(small=[0.9, 0.5, 0.5], large=[0.6, 0.6, 0.6])
    chosen, accuracy = comparison.tuned(results, ["small", "large"], [0, 1, 2])
    # Seed 0 alone speaks for "small": it may not vote for itself.
    assert chosen == ["large", "small", "small"]
    assert accuracy == pytest.approx([60, 50, 50])


def test_one_seed_alone_chooses_for_itself():
    results = planted(small=[0.9], large=[0.6])
    assert comparison.tuned(results, ["small", "large"], [0]) == (["small"], [90])


def test_another_score_may_choose():
    results = planted(small=[0.9, 0.9, 0.9], large=[0.6, 0.6, 0.6])

    def lower(results, variant, seeds):
        return [-value for value in comparison.final_accuracy(results, variant, seeds)]

    chosen, scores = comparison.tuned(results, ["small", "large"], [0, 1, 2], lower)
    assert chosen == ["large"] * 3
    assert scores == pytest.approx([-60] * 3)

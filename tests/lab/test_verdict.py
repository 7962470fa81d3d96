import itertools
import json
import math

import numpy as np
import pytest

from normally.lab.verdict import Criterion, Effect, bootstrap, decide, paired_effect


def criterion(low, high, at_least, seeds=3):
    return Criterion(Effect("x", (0.0,) * seeds, (low + high) / 2, low, high), at_least)


def test_bootstrap_agrees_with_the_enumeration_of_all_resamples():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=5)]
    exact = np.quantile(means, [0.025, 0.975])
    # 10,000 draws of a mean with standard deviation 2.5: quantiles within a few percent of it.
    assert bootstrap(values) == pytest.approx(tuple(exact), abs=0.25)


def test_bootstrap_covers_a_planted_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = bootstrap(generator.normal(3.0, 1.0, 30), resamples=400)
        hits += low <= 3.0 <= high
    # Nominal 0.95; the percentile interval at n = 30 is known to fall a little short of it, and
    # the count itself has a standard deviation of 0.013.
    assert 0.88 <= hits / 300 <= 0.99


def test_bootstrap_is_reproducible_and_takes_another_statistic():
    values = list(np.random.default_rng(2).normal(size=20))
    assert bootstrap(values, np.median) == bootstrap(values, np.median)
    assert bootstrap(values, np.median) != bootstrap(values)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="values must be finite numbers"):
        bootstrap(values)


def test_pairing_removes_what_the_seeds_share():
    shared = np.random.default_rng(3).normal(0, 100, 12)
    effect = paired_effect("gain", list(shared + 2), list(shared), "points")
    assert effect.estimate == pytest.approx(2)
    # The seeds differ by 100; without pairing the interval would be tens of points wide.
    assert effect.high - effect.low < 1e-9


def test_a_ratio_is_a_geometric_mean():
    effect = paired_effect("speed", [8.0, 2.0], [2.0, 2.0], ratio=True)
    assert effect.estimate == pytest.approx(2.0)
    assert (effect.low, effect.high) == pytest.approx((1.0, 4.0))
    assert effect.values == pytest.approx((4.0, 1.0))


def test_pairs_must_match_and_ratios_need_positive_numbers():
    with pytest.raises(ValueError, match="Got 2 and 1 values"):
        paired_effect("x", [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="needs positive values"):
        paired_effect("x", [1.0, 0.0], [1.0, 1.0], ratio=True)


@pytest.mark.parametrize(
    ("low", "high", "seeds", "status"),
    [
        (5.0, 9.0, 3, "holds"),
        (4.9, 9.0, 3, "inconclusive"),
        (1.0, 4.9, 3, "does not hold"),
        (1.0, 5.0, 3, "inconclusive"),
        (-3.0, -1.0, 3, "does not hold"),
        (6.0, 9.0, 2, "inconclusive"),
        (1.0, 2.0, 2, "inconclusive"),
    ],
)
def test_the_whole_interval_must_lie_on_one_side_of_the_threshold(low, high, seeds, status):
    assert criterion(low, high, 5.0, seeds).status == status


def test_what_the_runs_could_not_show_is_inconclusive():
    effect = Effect("x", (1.0,) * 5, 1.0, 1.0, 1.0)
    assert Criterion(effect, 2.0, decidable=False).status == "inconclusive"


def test_a_claim_with_several_criteria():
    holds, fails, open_ = criterion(6, 7, 5), criterion(1, 2, 5), criterion(4, 6, 5)
    assert decide([holds, holds], "").status == "holds"
    assert decide([holds, open_], "").status == "inconclusive"
    assert decide([open_, fails], "").status == "does not hold"
    assert decide([], "").status == "inconclusive"


@pytest.mark.parametrize(("planted", "status"), [(8.0, "holds"), (2.0, "does not hold")])
def test_a_planted_effect_gets_its_verdict(planted, status):
    generator = np.random.default_rng(4)
    control = generator.normal(70, 5, 9)
    treated = control + planted + generator.normal(0, 1, 9)
    effect = paired_effect("accuracy", list(treated), list(control), "points")
    verdict = decide([Criterion(effect, 5.0)], "found")
    assert verdict.status == status
    assert json.loads(json.dumps(verdict.as_json()))["criteria"][0]["at_least"] == 5.0

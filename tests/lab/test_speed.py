import itertools

import pytest
import torch

from normally import report
from normally.lab import Results, speed
from normally.lab.data import load


def results(*seeds, waited=0.0):
    records = {
        ("speed", seed): {"pairs": pairs, "backend": "compiled", "waited": [waited]}
        for seed, pairs in enumerate(seeds)
    }
    return Results(records, load("digits"), {}, len(seeds))


def test_both_sides_take_turns():
    order = []
    pairs = speed.interleaved(
        lambda: order.append("A"), lambda: order.append("B"), seconds=0.0, least=3
    )
    assert "".join(order) == "AB" * 5  # two to warm up, three that count
    assert len(pairs) == 3
    assert all(time >= 0 for time in itertools.chain(*pairs))


def test_the_clock_and_the_largest_number_of_pairs_end_it():
    assert len(speed.interleaved(int, int, seconds=60.0, most=7)) == 7


def test_the_ratio_is_the_median_over_the_pairs_of_all_seeds(monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", (("a shape", (2, 3, 4, 4), False),))
    effect = speed.ratio(results([[(1.0, 2.0), (1.0, 4.0)]], [[(2.0, 6.0)]]), 0)
    assert effect.values == (2.0, 4.0, 3.0)
    assert effect.estimate == 3.0
    assert 2.0 <= effect.low <= 3.0 <= effect.high <= 4.0


@pytest.mark.parametrize(
    ("theirs", "sentence"), [(2.0, "faster for 1 of 1"), (0.5, "slower for a")]
)
def test_the_section_says_where_it_is_slower(monkeypatch, theirs, sentence):
    monkeypatch.setattr(speed, "SHAPES", (("a shape", (2, 3, 4, 4), False),))
    with report.style():
        section = speed.section(results([[(1.0, theirs)] * 5]))
    assert sentence in section.content[0]
    assert "compiled" in section.content[0]


def test_a_disturbed_measurement_is_marked_and_not_counted(monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", (("a shape", (2, 3, 4, 4), False),))
    noisy = results([[(1.0, 320.0)] * 5], waited=0.4)
    assert speed.disturbed(noisy, 0)
    assert not speed.disturbed(results([[(1.0, 2.0)]], waited=0.01), 0)
    assert not speed.disturbed(results([[(1.0, 2.0)]], waited=None), 0)
    noisy.records["speed", 1] = {"pairs": [[(1.0, 2.0)]], "backend": "x", "waited": [0.0]}
    assert speed.ratio(noisy, 0).values == (2.0,)  # the quiet round alone
    del noisy.records["speed", 1]
    with report.style():
        section = speed.section(noisy)
    assert "faster for 0 of 0" in section.content[0]
    assert "1 of 1 measurements were disturbed" in section.content[0]


def test_both_sides_compute_the_same():
    """What is compared must be comparable: one step of either gives the same gradient."""
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    gradients = []
    for layer in speed.layers(3):
        x.grad = None
        layer(x).backward(torch.ones(4, 3, 8, 8))
        gradients.append(x.grad)
    # The sum of 256 unit-sized float32 terms a channel: a few ulp of their largest.
    assert torch.allclose(*gradients, rtol=0, atol=1e-5)

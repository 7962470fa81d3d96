"""`skipped_updates`: what it counts, and when it starts anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from normally import nn, reference
from tests.helpers import DEVICE, assert_same_bits, values


def batch(seed: int, *bad: int) -> Tensor:
    """(6, 3, 4) with a NaN in the channels `bad`."""
    x = values((6, 3, 4), torch.float32, seed=seed)
    for channel in bad:
        x[seed % 6, channel, 0] = torch.nan
    return x


def test_it_is_the_total_over_channels_and_batches() -> None:
    layer = nn.BatchNorm1d(3)
    assert layer.skipped_updates.dtype is torch.long
    assert layer.skipped_updates.shape == ()
    for step, (bad, total) in enumerate([((), 0), ((1,), 1), ((0, 1, 2), 4), ((), 4)]):
        layer(batch(step, *bad))
        assert layer.skipped_updates.item() == total
    assert layer.num_batches_tracked.item() == 4


def test_evaluation_does_not_count() -> None:
    layer = nn.BatchNorm1d(3).eval()
    layer(batch(0, 1))
    assert layer.skipped_updates.item() == 0


def test_without_running_statistics_nothing_is_skipped() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    layer(batch(0, 1))
    assert layer.skipped_updates.item() == 0
    assert layer.skipped_updates.shape == ()


def test_it_is_no_part_of_the_state_dict_but_follows_the_layer() -> None:
    layer = nn.BatchNorm1d(3)
    layer(batch(0, 1))
    assert list(layer.state_dict()) == list(torch.nn.BatchNorm1d(3).state_dict())
    assert layer.to(torch.float64).skipped_updates.item() == 1
    assert copy.deepcopy(layer).skipped_updates.item() == 1
    assert layer.to("meta").skipped_updates.is_meta


@pytest.mark.parametrize("how", ["load_state_dict", "reset_running_stats", "reset_parameters"])
def test_it_starts_anew_with_the_running_statistics(how: str) -> None:
    layer = nn.BatchNorm1d(3)
    layer(batch(0, 0, 2))
    assert layer.skipped_updates.item() == 2
    if how == "load_state_dict":
        layer.load_state_dict(torch.nn.BatchNorm1d(3).state_dict())
    else:
        getattr(layer, how)()
    assert layer.skipped_updates.item() == 0
    layer(batch(1, 1))
    assert layer.skipped_updates.item() == 1


@pytest.mark.parametrize("way", ["fresh", "loaded", "assigned", "meta"])
def test_the_cumulative_average_divides_by_what_entered(way: str) -> None:
    layer = nn.BatchNorm1d(3, momentum=None)
    seen: list[tuple[int, ...]] = [(0,), (), (0, 1, 2), (2,)]
    for step, bad in enumerate(seen):
        layer(batch(step, *bad))
    state = copy.deepcopy(layer.state_dict())
    if way == "loaded":
        layer = nn.BatchNorm1d(3, momentum=None)
        layer.load_state_dict(state)
    elif way == "assigned":
        with torch.device("meta"):
            layer = nn.BatchNorm1d(3, momentum=None)
        layer.load_state_dict(copy.deepcopy(state), assign=True)
    elif way == "meta":
        with torch.device("meta"):
            layer = nn.BatchNorm1d(3, momentum=None)
        layer.to_empty(device=DEVICE).load_state_dict(state)
    layer(batch(4, 1))
    for channel, entered in ((0, (1, 3)), (1, (0, 1, 3)), (2, (0, 1))):
        good = [batch(step)[:, channel : channel + 1] for step in entered]
        mean, var = reference.population_statistics(
            [*good, *(batch(4)[:, channel : channel + 1],) * (channel != 1)]
        )
        if way == "fresh" or channel == 1:  # nothing new entered channel 1
            expected = mean, var
        else:
            # A state dict has torch's keys alone, so the refused batches count from then on as in
            # torch: the fifth batch has the weight 1/5.
            old = state["running_mean"][channel].double(), state["running_var"][channel].double()
            new = reference.population_statistics([batch(4)[:, channel : channel + 1]])
            expected = tuple(
                reference.running_average(a, b, 1 / 5) for a, b in zip(old, new, strict=True)
            )
        # Up to four roundings of float32 buffers.
        assert layer.running_mean[channel].item() == pytest.approx(
            expected[0].item(), rel=1e-6, abs=1e-6
        )
        assert layer.running_var[channel].item() == pytest.approx(expected[1].item(), rel=1e-6)


def test_a_bad_batch_between_two_good_ones_leaves_no_trace() -> None:
    for momentum in (0.1, None):
        layer, twin = nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
        for step in range(3):
            layer(batch(step))
            layer(batch(step, 0, 1, 2))
            twin(batch(step))
        assert_same_bits(layer.running_mean, twin.running_mean)
        assert_same_bits(layer.running_var, twin.running_var)
        assert layer.skipped_updates.item() == 9

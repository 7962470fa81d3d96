"""Promise 13: a bad batch harms nobody else, leaves every running statistic clean, is counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from normally import nn, reference
from tests.device.functional import batch_norm
from tests.helpers import ACTS, assert_same_bits, lay_out, values

BAD = (math.nan, math.inf, -math.inf)
SHAPES = [(9, 5), (4, 17, 33), (2, 16, 7, 7), (33, 8, 4), (3, 3, 1025)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_channels_keep_their_bits(shape: tuple[int, ...], layout: str, bad: float) -> None:
    channels = shape[1]
    x = values(shape, torch.float32)
    dirty = x.clone()
    position = tuple(size // 2 for size in shape)
    dirty[position] = bad
    broken = position[1]
    others = [c for c in range(channels) if c != broken]
    g = values(shape, torch.float32, seed=1)
    for act, with_residual in itertools.product((None, "relu", "gelu"), (False, True)):
        results = []
        for sample in (x, dirty):
            leaf = lay_out(sample, layout).detach().requires_grad_()
            weight = torch.linspace(0.5, 2, channels).requires_grad_()
            mean, var = torch.zeros(channels), torch.ones(channels)
            skipped, count = torch.zeros(channels, dtype=torch.long), torch.tensor(0)
            y = batch_norm(
                leaf, mean, var, weight, None, True, act=act, residual=g if with_residual else None,
                num_batches_tracked=count, skipped_updates=skipped,
            )  # fmt: skip
            gradients = torch.autograd.grad(y, [leaf, weight], g)
            results.append((y, gradients[0], gradients[1], mean, var, skipped, count))
        clean, spoilt = results
        assert_same_bits(spoilt[0][:, others], clean[0][:, others], "output")
        assert_same_bits(spoilt[1][:, others], clean[1][:, others], "gradient")
        for index in (2, 3, 4):
            assert_same_bits(spoilt[index][others], clean[index][others])
        assert spoilt[3][broken].item() == 0.0
        assert spoilt[4][broken].item() == 1.0
        assert spoilt[5].tolist() == [int(c == broken) for c in range(channels)]
        assert clean[5].tolist() == [0] * channels
        # It is not hidden: the bad channel's own output is what the formula gives, NaN.
        assert spoilt[0][:, broken].isnan().any()


@pytest.mark.parametrize("act", ACTS)
def test_nan_is_not_swallowed(act: str | None) -> None:
    x = values((4, 3, 21), torch.float32)
    x[2, 1, 5] = math.nan
    for layout in ("contiguous", "channels_last"):
        y = batch_norm(lay_out(x, layout), None, None, training=True, act=act)
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("payload", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7FFF8000])
def test_a_nan_of_any_payload_survives_the_narrowing(payload: int, dtype: torch.dtype) -> None:
    """Rounding a mantissa of ones up as if it were a number makes 0 of a NaN."""
    nan = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    x = values((4, 1, 37), dtype)
    for layout in ("contiguous", "channels_last"):
        for weight, bias in ((None, nan), (nan, None)):
            for training in (True, False):
                statistics = (None, None) if training else (torch.zeros(1), torch.ones(1))
                y = batch_norm(lay_out(x, layout), *statistics, weight, bias, training)
                assert y.isnan().all(), (layout, training)


@pytest.mark.usefixtures("born_on_device")
def test_the_plain_average_of_the_good_batches() -> None:
    """momentum=None divides by the batches that entered, channel by channel."""
    layer = nn.BatchNorm1d(3, momentum=None)
    good: list[list[torch.Tensor]] = [[], [], []]
    for step in range(8):
        x = values((6, 3, 4), torch.float32, seed=step)
        spoilt = step % 4  # 0: channel 0, 1: channel 1, 2: none of them, 3: all of them
        for channel in range(3):
            good[channel].append(x[:, channel : channel + 1].clone())
        for channel in {0: [0], 1: [1], 2: [], 3: [0, 1, 2]}[spoilt]:
            x[step % 6, channel, 0] = BAD[step % 3]
            good[channel].pop()
        layer(x)
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 8
    assert layer.skipped_updates.item() == 2 + 2 + 3 * 2
    for channel, batches in enumerate(good):
        mean, var = reference.population_statistics(batches)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        # Up to six float32 updates.
        assert layer.running_mean[channel].item() == pytest.approx(mean.item(), rel=1e-6, abs=1e-6)
        assert layer.running_var[channel].item() == pytest.approx(var.item(), rel=1e-6)


@pytest.mark.usefixtures("born_on_device")
def test_the_average_starts_anew_with_loaded_statistics() -> None:
    """Batches that were skipped before a checkpoint was loaded are no part of its count."""
    plain = torch.nn.BatchNorm1d(2, momentum=None)
    plain(values((5, 2), torch.float32, seed=9))
    layer = nn.BatchNorm1d(2, momentum=None)
    for _ in range(3):
        layer(torch.full((5, 2), math.nan))
    layer.load_state_dict(plain.state_dict())
    for seed in range(3):
        x = values((5, 2), torch.float32, seed=seed)
        layer(x)
        plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


@pytest.mark.usefixtures("born_on_device")
def test_a_lazy_layer_counts_after_loading_a_state_dict() -> None:
    plain = torch.nn.BatchNorm1d(2)
    layer = nn.LazyBatchNorm1d()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 2)
    x[0, 1] = math.nan
    layer(x)
    assert layer.skipped_updates.item() == 1


@pytest.mark.usefixtures("born_on_device")
def test_statistics_that_the_buffer_cannot_hold_do_not_enter_it() -> None:
    """1e30 is finite, its variance is not in float32."""
    layer = nn.BatchNorm1d(2)
    y = layer(torch.randn(8, 2) * torch.tensor([1e30, 1.0]))
    assert y.isfinite().all()
    assert layer.running_var is not None
    assert layer.running_var.isfinite().all()
    assert layer.skipped_updates.item() == 1


@pytest.mark.usefixtures("born_on_device")
def test_training_goes_on_after_a_bad_batch() -> None:
    layer = nn.BatchNorm2d(3)
    twin = nn.BatchNorm2d(3)
    for step in range(5):
        x = values((4, 3, 5, 5), torch.float32, seed=step)
        twin_input = x.clone()
        if step == 2:
            layer(torch.full_like(x, math.nan))
        layer(x)
        twin(twin_input)
    assert_same_bits(layer.running_mean, twin.running_mean)
    assert_same_bits(layer.running_var, twin.running_var)
    assert layer.skipped_updates.item() == 3

"""The keyword arguments that torch does not have, each against its plain meaning."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.device.functional import batch_norm
from tests.helpers import ACTS, assert_same_bits, check_batch_norm, values


@pytest.mark.parametrize("channel_dim", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_channel_dim_is_the_transposed_call(channel_dim: int, training: bool) -> None:
    x = values((4, 4, 4, 4), torch.float32)  # a cube: a forgotten transposition keeps the shape
    weight, bias = torch.linspace(-1, 2, 4), torch.linspace(2, -1, 4)
    for act, kind in itertools.product((None, "relu", "gelu"), ("none", "same", "wide", "narrow")):
        residual: Tensor | None = {
            "none": None,
            "same": values((4, 4, 4, 4), torch.float32, seed=1),
            "wide": values((4, 4, 4, 4), torch.float64, seed=1),
            "narrow": values((1, 4, 1, 4), torch.float32, seed=1),
        }[kind]
        results = []
        for moved in (False, True):
            running = [torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)]
            leaf = x.clone().requires_grad_()
            other = None if residual is None else residual.clone().requires_grad_()
            if moved:
                whole = None if other is None else other.expand_as(x).movedim(channel_dim, 1)
                y = batch_norm(
                    leaf.movedim(channel_dim, 1), *running, weight, bias, training,
                    act=act, residual=whole,
                ).movedim(1, channel_dim)  # fmt: skip
            else:
                y = batch_norm(
                    leaf, *running, weight, bias, training,
                    act=act, residual=other, channel_dim=channel_dim,
                )  # fmt: skip
            (y * torch.arange(256.0).view(x.shape)).sum().backward()
            results.append((y, *running, leaf.grad, None if other is None else other.grad))
        for name, ours, plain in zip(
            ("output", "mean", "var", "gradient", "of residual"), *results, strict=True
        ):
            assert_same_bits(ours, plain, f"{name} with {act}, residual {kind}")


def test_channel_dim_last_of_two() -> None:
    x = values((6, 5), torch.float32)
    assert_same_bits(
        batch_norm(x, None, None, training=True, channel_dim=-1),
        batch_norm(x, None, None, training=True),
    )


@pytest.mark.parametrize("correction", [0, 1, 2, 5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_what_divides_and_what_is_stored(unbiased: bool, correction: int) -> None:
    for dtype, act in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), (None, "relu")
    ):
        x = values((2, 3, 4), dtype)  # 8 values a channel, so that m - correction matters
        check_batch_norm(x, correction=correction, unbiased=unbiased, act=act)
        check_batch_norm(x.movedim(1, 2).contiguous().movedim(2, 1), correction=correction, act=act)


def test_correction_does_not_touch_what_is_stored() -> None:
    x = values((2, 3, 4), torch.float32)
    stored = []
    for correction in (0, 1):
        var = torch.ones(3)
        batch_norm(x, torch.zeros(3), var, training=True, momentum=1.0, correction=correction)
        stored.append(var)
    assert_same_bits(*stored)
    torch.testing.assert_close(stored[0], x.var((0, 2)))  # torch.var divides by m - 1


def test_single_value_may_use_the_running_statistics() -> None:
    mean, var = torch.tensor([0.5, -1.0]), torch.tensor([4.0, 0.25])
    count, skipped = torch.tensor(3), torch.zeros(2, dtype=torch.long)
    x = torch.tensor([[1.5, 2.0]]).requires_grad_()
    y = batch_norm(
        x, mean, var, training=True, on_single_value="running",
        num_batches_tracked=count, skipped_updates=skipped,
    )  # fmt: skip
    torch.testing.assert_close(y, F.batch_norm(x, mean, var))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (var + 1e-5).rsqrt()[None])
    assert (mean.tolist(), var.tolist()) == ([0.5, -1.0], [4.0, 0.25])
    assert (count.item(), skipped.tolist()) == (3, [0, 0])


def test_single_value_without_running_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm(torch.ones(1, 2), None, None, training=True, on_single_value="running")


def test_cumulative_average_counts_batches() -> None:
    batches = [values((5, 3, 4), torch.float32, seed=s) for s in range(4)]
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for batch in batches:
        batch_norm(batch, mean, var, training=True, momentum=None, num_batches_tracked=count)
    wanted_mean, wanted_var = reference.population_statistics(batches)
    assert count.item() == 4
    # Four float32 updates: 4 roundings of values up to 3.
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), wanted_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_running_statistics_of_another_dtype(dtype: torch.dtype) -> None:
    x = values((8, 3, 4), torch.bfloat16)
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    batch_norm(x, mean, var, training=True, momentum=0.25)
    expected_mean = 0.25 * x.double().mean((0, 2))
    expected_var = 0.75 + 0.25 * x.double().var((0, 2))
    tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-6), "atol": 1e-6}
    torch.testing.assert_close(mean.double(), expected_mean, **tolerance)
    torch.testing.assert_close(var.double(), expected_var, **tolerance)
    y = batch_norm(x, mean, var)
    wanted = reference.batch_norm(x, mean, var)
    torch.testing.assert_close(y, wanted, rtol=2**-7, atol=1e-6)  # one unit of bfloat16


def test_every_activation_is_named() -> None:
    assert ACTS == (
        None, "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish",
        "hardsigmoid", "sigmoid", "tanh",
    )  # fmt: skip


def test_promoted_sum_with_a_wider_residual() -> None:
    x = values((4, 3, 5), torch.bfloat16)
    residual = values((4, 3, 5), torch.float32, seed=1)
    y = batch_norm(x, None, None, training=True, residual=residual, act="relu")
    plain = torch.relu(batch_norm(x, None, None, training=True) + residual)
    assert_same_bits(y, plain)

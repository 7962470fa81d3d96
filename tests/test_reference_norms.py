"""The formulas of the norms beside batch norm: against torch in float64, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import reference
from tests.helpers import values


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_layer_norm_over_one_dimension(dim: int) -> None:
    x = values((3, 4, 5, 6), torch.float64)
    size = x.shape[dim]
    weight, bias = torch.randn(size).double(), torch.randn(size).double()
    wanted = F.layer_norm(x.movedim(dim, -1), (size,), weight, bias).movedim(-1, dim)
    y = reference.layer_norm(x, (size,), weight, bias, dim=dim)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rms_norm_is_torchs(count: int) -> None:
    x = values((2, 3, 4, 5), torch.float64)
    size = tuple(x.shape[-count:])
    weight = torch.randn(size).double()
    for eps in (None, 1e-6, 0.5):
        wanted = F.rms_norm(x, size, weight, eps)
        torch.testing.assert_close(reference.rms_norm(x, size, weight, eps), wanted)
        centred = reference.rms_norm(x, size, weight - 1, eps, zero_centered_weight=True)
        torch.testing.assert_close(centred, wanted)


def test_rms_norm_by_hand() -> None:
    x = [3.0, -4.0, 12.0]
    root = math.sqrt((9 + 16 + 144) / 3 + 0.25)
    y = reference.rms_norm(torch.tensor([x]).double(), (3,), torch.tensor([1.0, 2.0, -1.0]), 0.25)
    wanted = [3 / root, -8 / root, -12 / root]
    assert y[0].tolist() == pytest.approx(wanted, rel=1e-15)


def test_the_roundings_of_rms_norm() -> None:
    """bfloat16 keeps 8 bits: 1/3 of 1 + 2^-7 rounds differently before and after the weight."""
    x = values((40, 16), torch.bfloat16)
    weight = torch.linspace(0.3, 1.7, 16)
    wide = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    once = (wide * weight.double()).bfloat16()
    twice = (wide.bfloat16().double() * weight.double()).bfloat16()
    assert not torch.equal(once, twice)
    for casting, wanted in (("torch", once), ("gemma", once), ("llama", twice)):
        y = reference.rms_norm(x, (16,), weight, 1e-6, casting=casting)
        assert torch.equal(y, wanted), casting


def test_default_eps_is_torchs() -> None:
    assert reference.default_eps(torch.float64) == torch.finfo(torch.float64).eps
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reference.default_eps(dtype) == torch.finfo(torch.float32).eps
    for dtype in (torch.float64, torch.float32):
        x = torch.full((1, 2), 1e-5, dtype=dtype)
        torch.testing.assert_close(
            reference.rms_norm(x, (2,)), F.rms_norm(x, (2,)), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)])
def test_group_norm_is_torchs(shape: tuple[int, ...], groups: int) -> None:
    x = values(shape, torch.float64)
    weight, bias = torch.randn(6).double(), torch.randn(6).double()
    torch.testing.assert_close(
        reference.group_norm(x, groups, weight, bias), F.group_norm(x, groups, weight, bias)
    )


def test_group_norm_by_hand() -> None:
    """Two groups of two channels: their four values each have mean 3 and 0, variance 5 and 2."""
    x = torch.tensor([[[0.0, 2.0], [4.0, 6.0], [-2.0, 0.0], [2.0, 0.0]]]).double()
    y = reference.group_norm(x, 2, eps=0.0)
    a, b = 1 / math.sqrt(5), 1 / math.sqrt(2)
    wanted = [[-3 * a, -a], [a, 3 * a], [-2 * b, 0.0], [2 * b, 0.0]]
    torch.testing.assert_close(y[0], torch.tensor(wanted).double())
    stats = reference.group_statistics(x, 2)
    assert stats.tolist() == [[[3.0, 0.0]], [[5.0, 2.0]], [[4.0, 4.0]]]


def test_instance_norm_is_group_norm_with_a_group_a_channel() -> None:
    x = values((3, 5, 4, 6), torch.float64)
    torch.testing.assert_close(reference.group_norm(x, 5), F.instance_norm(x))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_local_response_norm_by_hand(size: int) -> None:
    """Channel c sums over c - size//2 … c + (size - 1)//2, what there is of them."""
    x = values((2, 6, 3), torch.float64)
    y = reference.local_response_norm(x, size, 0.7, 0.6, 1.3)
    torch.testing.assert_close(y, F.local_response_norm(x, size, 0.7, 0.6, 1.3))
    for c in range(6):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        wanted = x[:, c] / (1.3 + 0.7 / size * window.square().sum(1)) ** 0.6
        torch.testing.assert_close(y[:, c], wanted)


def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` with NaN where a random mask hides it, and the mask."""
    mask = torch.rand_like(x[:, :1]) < 0.6
    mask[0], mask[1] = True, False
    return torch.where(mask, x, math.nan), mask


def test_masked_statistics_are_those_of_what_is_kept() -> None:
    x, mask = masked(values((4, 6, 5, 7), torch.float64))
    mean, var = reference.moments(x, (2, 3), mask)
    for n in range(4):
        kept = x[n][:, mask[n, 0]]
        if not kept.numel():
            assert torch.equal(mean[n], torch.zeros_like(mean[n]))
            assert torch.equal(var[n], torch.ones_like(var[n]))
            continue
        torch.testing.assert_close(mean[n].flatten(), kept.mean(1))
        torch.testing.assert_close(var[n].flatten(), kept.var(1, correction=0))
        y = reference.group_norm(x, 3, mask=mask)[n][:, mask[n, 0]]
        torch.testing.assert_close(y, F.group_norm(kept[None], 3)[0])
    batch = x.movedim(1, -1)[mask[:, 0]]
    y = reference.batch_norm(x, mask=mask).movedim(1, -1)[mask[:, 0]]
    torch.testing.assert_close(y, F.batch_norm(batch, None, None, training=True))
    stats = reference.group_statistics(x, 3, mask)
    assert stats[2, :, 0].tolist() == (2 * mask.sum((1, 2, 3))).tolist()


def test_masked_rows() -> None:
    x = values((4, 6, 5), torch.float64)
    mask = torch.rand(4, 6, 1) < 0.6
    hidden = torch.where(mask, x, math.inf)
    for masked_norm, plain in (
        (reference.layer_norm(hidden, (5,), mask=mask), F.layer_norm(x, (5,))),
        (reference.rms_norm(hidden, (5,), mask=mask), F.rms_norm(x, (5,))),
    ):
        torch.testing.assert_close(masked_norm, torch.where(mask, plain, 0.0))
    # Inside a row: what is kept of it by itself.
    y = reference.layer_norm(hidden, (6, 5), mask=mask)
    for n in range(4):
        kept = x[n][mask[n, :, 0]].flatten()
        torch.testing.assert_close(y[n][mask[n, :, 0]].flatten(), F.layer_norm(kept, kept.shape))


def test_activations_come_last() -> None:
    x = values((3, 4, 5), torch.float64)
    weight, bias = torch.randn(4).double(), torch.randn(4).double()
    for act in reference.ACTIVATIONS:
        for norm, options in (
            (reference.layer_norm, {"normalized_shape": (4,), "dim": 1}),
            (reference.group_norm, {"num_groups": 2}),
        ):
            plain = norm(x, weight=weight, bias=bias, **options)  # type: ignore[operator]
            fused = norm(x, weight=weight, bias=bias, act=act, **options)  # type: ignore[operator]
            torch.testing.assert_close(fused, reference.activate(plain, act))

"""Mixed precision: autocast, and a gradient scaler whose steps may overflow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normally import nn
from tests.device import DEVICE
from tests.gpu.layers import LAYERS, cotangent, make, sample
from tests.helpers import assert_same_bits

HALVES = (torch.bfloat16, torch.float16)


class Block(torch.nn.Module):
    """Two convolutions and a shortcut, as in a ResNet."""

    def __init__(self, family: Any, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = family.BatchNorm2d(channels)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = family.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + x)


def network(family: Any) -> torch.nn.Sequential:
    """The same parameters whether the norms are torch's or ours."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1, bias=False), family.BatchNorm2d(32),
        torch.nn.ReLU(), Block(family, 32), Block(family, 32), family.GroupNorm(8, 32),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), family.LayerNorm(32),
        torch.nn.Linear(32, 5),
    ).to(DEVICE)  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the brightest of five stripes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 5, (64,), generator=generator)
    images = torch.randn(64, 3, 20, 20, generator=generator)
    for image, number in zip(images, classes.tolist(), strict=True):
        image[:, :, 4 * number : 4 * number + 4] += 1.0
    return images.to(DEVICE), classes.to(DEVICE)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    classes: Tensor,
    dtype: torch.dtype,
) -> float:
    """One step; the loss before it."""
    optimizer.zero_grad()
    with torch.autocast(DEVICE.type, dtype):
        loss = F.cross_entropy(model(images), classes)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


def scaler_for(dtype: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12, enabled=dtype is torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_half_inputs_keep_their_dtype_and_parameters_theirs(name: str, dtype: torch.dtype) -> None:
    """Autocast changes nothing: the bits are those without it, and parameters stay float32."""
    layer = make(name)
    twin = copy.deepcopy(layer)
    results = []
    for module, enabled in ((layer, True), (twin, False)):
        x = sample(name, dtype=dtype)
        with torch.autocast(DEVICE.type, dtype, enabled=enabled):
            y = module(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], cotangent(name, dtype))
        assert y.dtype is gradients[0].dtype is dtype
        assert all(t.dtype is torch.float32 for t in gradients[1:])
        results.append([y.detach(), *gradients])
    for with_autocast, without in zip(*results, strict=True):
        assert_same_bits(with_autocast, without)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_between_convolutions_the_activations_stay_half(dtype: torch.dtype) -> None:
    model = network(nn)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    with torch.autocast(DEVICE.type, dtype):
        model(batch(0)[0])
    assert seen == [dtype] * 7


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_trains_as_with_torchs_norms(dtype: torch.dtype) -> None:
    """The first loss agrees to the dtype's rounding; then both learn the task."""
    losses: dict[str, list[float]] = {}
    for name, family in (("ours", nn), ("theirs", torch.nn)):
        model = network(family)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = scaler_for(dtype)
        losses[name] = [train(model, optimizer, scaler, *batch(seed), dtype) for seed in range(30)]
    # torch's group and layer norm give float32 under autocast; ours round to the dtype. Nine
    # roundings in a row, each of up to eps/2 of values around 1, in a mean over 64 images.
    eps = torch.finfo(dtype).eps
    assert losses["ours"][0] == pytest.approx(losses["theirs"][0], abs=4 * eps)
    for found in losses.values():
        assert all(loss == loss for loss in found)  # none is NaN
        assert sum(found[-5:]) / 5 < 0.5 * found[0]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_overflowed_step_leaves_no_trace(momentum: float | None) -> None:
    """Weights and running statistics keep their bits; the scale is halved; training goes on."""
    dtype = torch.float16
    model = network(nn)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = scaler_for(dtype)
    train(model, optimizer, scaler, *batch(0), dtype)
    before, scale = copy.deepcopy(model.state_dict()), scaler.get_scale()

    images, classes = batch(1)
    train(model, optimizer, scaler, images * 1e6, classes, dtype)  # infinite in float16
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_same_bits(value, before[key], key)
    assert scaler.get_scale() == scale / 2
    for norm in norms:
        # The batch is counted as in torch, and so is each of its channels that was refused.
        assert norm.num_batches_tracked.item() == 2
        assert norm.skipped_updates.item() == norm.num_features

    loss = train(model, optimizer, scaler, images, classes, dtype)
    assert loss == loss
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(norms[0].running_mean, before["1.running_mean"])


def test_torchs_running_statistics_do_not_survive_that_step() -> None:
    """What the test above is worth: beside torch's layer the same batch leaves NaN for good."""
    ours, theirs = nn.BatchNorm2d(3).to(DEVICE), torch.nn.BatchNorm2d(3).to(DEVICE)
    x = (batch(0)[0] * 1e6).half()
    for layer in (ours, theirs):
        layer(x)
    assert ours.running_mean.isfinite().all()
    assert not theirs.running_mean.isfinite().any()

"""recalibrate: whatever the model is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import convert, fuse, nn, recalibrate
from tests.surgery.populations import (
    FAMILIES,
    assert_own_population,
    assert_population,
    images,
    inputs,
    network,
    rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "_skipped_updates")


class _NormAct(torch.nn.BatchNorm2d):
    """In timm's manner: a forward of its own around torch's function."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = torch.nn.Identity(), torch.nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        uses = not self.training or self.track_running_stats
        x = torch.nn.functional.batch_norm(
            x,
            self.running_mean if uses else None,
            self.running_var if uses else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum or 0.0,
            self.eps,
        )
        y: Tensor = self.act(self.drop(x))
        return y


class _ChannelsLast(torch.nn.BatchNorm1d):
    """(N, L, C): what it is called with is not what it normalizes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("converts", [False, True])
def test_layers_of_others(layerwise: bool, converts: bool) -> None:
    model = torch.nn.Sequential(_NormAct(3), torch.nn.Conv2d(3, 4, 3), _NormAct(4))
    if converts:
        convert(model)
    batches = list(images().split(9))
    found = inputs(copy.deepcopy(model), batches)
    recalibrate(model, batches, layerwise=layerwise)
    if layerwise:
        assert_own_population(model, [images()])
    else:
        for path, values in found.items():
            assert_population(model.get_submodule(path), values)


class _Whitened(torch.nn.BatchNorm2d):
    """Calls torch's function for something else before."""

    def forward(self, input: Tensor) -> Tensor:
        x = torch.nn.functional.batch_norm(input, torch.ones(3), torch.ones(3))
        return super().forward(x)


def test_what_a_forward_of_its_own_normalizes_is_seen_or_left() -> None:
    x = images()[:, :, 0]
    layer = _ChannelsLast(3)
    recalibrate(layer, list(x.mT.split(9)))
    assert_population(layer, rows(x))
    other = _Whitened(3)
    recalibrate(other, list(images().split(9)))
    assert_population(other, rows((images() - 1) / (1 + 1e-5) ** 0.5))

    class Own(torch.nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            shape = (1, -1, 1, 1)
            return input - self.running_mean.view(shape)  # type: ignore[union-attr]

    model = torch.nn.Sequential(Own(3), torch.nn.BatchNorm2d(3))
    for layerwise in (False, True):
        _, report = recalibrate(model, [images()], layerwise=layerwise, return_report=True)
        assert model[0].running_mean.eq(0).all()
        assert_population(model[1], rows(images()))
        assert [change.path for change in report.changed] == ["1"]
        assert "0  Own left: its forward is its own" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0", "densenet121"])
def test_models_of_timm(name: str) -> None:
    """Their norms apply activations; up to 121 of them, behind each other in many ways."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    model = timm.create_model(name).double()
    x = torch.randn(12, 3, 64, 64, dtype=torch.float64) + torch.linspace(-1, 1, 12).view(
        -1, 1, 1, 1
    )
    _, report = recalibrate(model, list(x.split(5)), layerwise=True, return_report=True)
    assert not report.left
    assert_own_population(model, [x])


def test_models_of_hugging_face() -> None:
    """Mappings with labels, and BatchFeature, which is no dict."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).double()
    x = images(dtype=torch.float64)
    batches = [{"pixel_values": p, "labels": torch.zeros(len(p)).long()} for p in x.split(16)]
    for kind in (dict, transformers.BatchFeature):
        _, report = recalibrate(model, list(map(kind, batches)), layerwise=True, return_report=True)
        assert not report.left
        assert_own_population(model, [x])


def test_fused_models() -> None:
    """A norm whose activation and residual are applied by it gets what it got before."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    torch.manual_seed(5)
    plain = torch.nn.Sequential(
        Block(), torch.nn.BatchNorm2d(3), torch.nn.SiLU(), torch.nn.Conv2d(3, 3, 3), Block()
    ).double()
    x = images(dtype=torch.float64)
    fused, found = fuse(copy.deepcopy(plain), x[:4], return_report=True)
    assert len(found.changed) == 3
    for layerwise in (False, True):
        _, report = recalibrate(fused, x.split(9), layerwise=layerwise, return_report=True)
        recalibrate(plain, x.split(9), layerwise=layerwise)
        assert len(report.changed) == 3
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-11, atol=1e-11)


def test_synchronized_layers_without_processes() -> None:
    for layer in (torch.nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)):
        recalibrate(layer, list(images().split(9)))
        assert_population(layer, rows(images()))


def test_compiled_models() -> None:
    """Code that was compiled before does not see what is put in a layer's place: it is not run."""
    model = network(torch.nn).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images())
    recalibrate(compiled, list(images().split(9)), layerwise=True)  # type: ignore[arg-type]
    assert_own_population(model, [images()])
    model = network(torch.nn).eval()
    model.compile(backend="eager")
    model(images())
    recalibrate(model, list(images().split(9)), layerwise=True)
    assert_own_population(model, [images()])
    torch.compiler.reset()


@FAMILIES
def test_autocast(family: Any) -> None:
    """The statistics are of what the layer gets, and float32 buffers hold them."""
    model = network(family).eval()
    batches = list(images().split(16))
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate(model, batches, layerwise=True)
        assert_own_population(model, [images()])


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(family: Any, dtype: torch.dtype) -> None:
    model = network(family, dtype)
    batches = list(images(dtype=dtype).split(16))
    recalibrate(model, batches)
    assert model[1].running_var.dtype is dtype
    assert_population(model[1], rows(model[0](images(dtype=dtype))))


def test_statistics_that_were_not_finite_are_healed() -> None:
    for layerwise in (False, True):
        model = network(torch.nn)
        for path in (1, 5, 8):
            model[path].running_mean.fill_(torch.nan)
            model[path].running_var.fill_(torch.inf)
        recalibrate(model, list(images().split(9)), layerwise=layerwise)
        assert all(t.isfinite().all() for t in model.state_dict().values())

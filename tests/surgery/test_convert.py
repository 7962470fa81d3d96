"""convert and revert: other classes, the same numbers, and the very same model again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normally
from normally import convert, revert
from tests.helpers import assert_same_bits
from tests.surgery.models import Residual, assert_same_function, classes, randomized, snapshot

C = 4
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "BatchNorm1d": (nn.BatchNorm1d(C), (6, C, 5)),
    "BatchNorm2d": (nn.BatchNorm2d(C, momentum=None), (6, C, 3, 2)),
    "BatchNorm3d": (nn.BatchNorm3d(C, affine=False), (6, C, 2, 3, 2)),
    "no statistics": (nn.BatchNorm2d(C, track_running_stats=False), (6, C, 3, 2)),
    "InstanceNorm1d": (nn.InstanceNorm1d(C, affine=True), (6, C, 5)),
    "InstanceNorm2d": (nn.InstanceNorm2d(C, track_running_stats=True), (6, C, 5, 2)),
    "InstanceNorm3d": (nn.InstanceNorm3d(C), (2, C, 5, 2, 2)),
    "LayerNorm": (nn.LayerNorm((3, C), eps=1e-3), (6, 3, C)),
    "LayerNorm no bias": (nn.LayerNorm(C, bias=False), (6, 3, C)),
    "RMSNorm": (nn.RMSNorm(C), (6, 3, C)),
    "GroupNorm": (nn.GroupNorm(2, C), (6, C, 3)),
    "LocalResponseNorm": (nn.LocalResponseNorm(3), (6, C, 3)),
    "SyncBatchNorm": (nn.SyncBatchNorm(C), (6, C, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_layers(name: str) -> None:
    template, shape = LAYERS[name]
    layer = randomized(copy.deepcopy(template))
    twin = copy.deepcopy(layer)
    before, keys, text = snapshot(layer), list(layer.state_dict()), repr(layer)
    assert convert(layer) is layer
    assert type(layer) is getattr(normally.nn, type(twin).__name__)
    assert isinstance(layer, type(twin)) or name == "SyncBatchNorm"
    assert list(layer.state_dict()) == keys
    assert repr(layer).startswith(text[:-1])
    x = torch.randn(shape, dtype=torch.float64)
    if name == "SyncBatchNorm":  # torch's has no CPU kernels
        twin = randomized(nn.BatchNorm1d(C)).train()
    assert_same_function(layer, twin, x)
    revert(layer)
    assert snapshot(layer) == before


def test_a_model_there_and_back() -> None:
    model = randomized(Residual()).train()
    model.blocks.eval()
    seen: list[str] = []
    model.stem[1].register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    model.blocks[0].bn1.remark = "mine"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin, before = copy.deepcopy(model), snapshot(model)
    assert convert(model) is model
    assert isinstance(model.blocks[0].bn1, normally.nn.BatchNorm2d)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert model.blocks[0].bn1.remark == "mine"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for (name, a), (_, b) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert_same_bits(a, b, name)
    assert_same_function(model, twin, torch.randn(5, 3, 8, 8, dtype=torch.float64))
    assert seen
    seen.clear()
    revert(model)
    assert snapshot(model) == before


def test_what_was_learnt_meanwhile_is_kept() -> None:
    models = [randomized(Residual()), randomized(Residual())]
    convert(models[0])
    for _ in range(3):
        for model in models:
            x = torch.linspace(-1, 1, 5 * 3 * 64, dtype=torch.float64).view(5, 3, 8, 8)
            model.zero_grad()
            model(x).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
    revert(models[0])
    assert classes(models[0]) == classes(models[1])
    for (name, a), (_, b) in zip(*(m.state_dict().items() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("first", ["input", "nothing"])
def test_lazy_layers_stay_lazy(first: str) -> None:
    model = convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True)))
    assert type(model[0]) is normally.nn.LazyBatchNorm2d
    if first == "input":
        model(torch.randn(4, 3, 5, 5))
        assert type(model[0]) is normally.nn.BatchNorm2d
        assert model[0].skipped_updates.item() == 0
    revert(model)
    expected = [nn.BatchNorm2d, nn.InstanceNorm2d] if first == "input" else [
        nn.LazyBatchNorm2d, nn.LazyInstanceNorm2d]  # fmt: skip
    assert [type(m) for m in model] == expected
    assert model(torch.randn(4, 3, 5, 5)).shape == (4, 3, 5, 5)


class WithConstructor(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class Stranger(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RmsNorm(nn.Module):
    """As in many language models."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.variance_epsilon = 1e-6
        self.offset = offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        x = hidden_states.to(torch.promote_types(dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return ((self.weight + self.offset) * x).to(dtype)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Gated(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.sigmoid()


def gated_norm(size: int) -> nn.Module:
    layer = Gated(size)
    type(layer).__name__ = "GatedNorm"
    return layer


OFFSET = "normally's RMS norm (zero_centered_weight=True)"
LEAKY = "normally's batch norm (act='leaky_relu(0.3)')"
FOREIGN: dict[str, tuple[nn.Module, tuple[int, ...], str | None]] = {
    "constructor": (WithConstructor(C), (6, C, 3, 3), "normally.nn.BatchNorm2d"),
    "channels first": (ChannelsFirst(C), (2, C, 3, 5), "normally's layer norm (dim=1)"),
    "rms": (RmsNorm(C), (2, 3, C), "normally's RMS norm"),
    "rms zero-centered": (RmsNorm(C, 1.0), (2, 3, C), OFFSET),
    "relu": (NormAct(C, nn.ReLU()), (6, C, 3, 3), "normally's batch norm (act='relu')"),
    "leaky": (NormAct(C, nn.LeakyReLU(0.3)), (6, C, 3, 3), LEAKY),
    "no act": (NormAct(C, nn.Identity()), (6, C, 3, 3), "normally's batch norm"),
    "other act": (NormAct(C, nn.Mish()), (6, C, 3, 3), "normally's batch norm"),
    "stranger": (Stranger(C), (6, C, 3, 3), None),
    "gated": (gated_norm(C), (2, 3, C), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_layers(name: str) -> None:
    template, shape, expected = FOREIGN[name]
    model = randomized(nn.Sequential(copy.deepcopy(template)))
    if name.startswith("rms zero"):
        torch.nn.init.uniform_(model[0].weight, -0.5, 0.5)
    twin, before = copy.deepcopy(model), snapshot(model)
    model, report = convert(model, return_report=True)
    (change,) = report.changes
    assert change.done == (expected is not None)
    if expected is None:
        assert "agrees with none" in change.note
        assert snapshot(model) == before
        return
    assert change.note == expected
    assert isinstance(model[0], type(twin[0])) or name == "constructor"
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_function(model, twin, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert_same_function(again, model, x)
        revert(again)
        assert type(again[0]) is type(twin[0])
    revert(model)
    assert snapshot(model) == before


class LlamasNorm(nn.Module):
    """In the form of Llama's: half inputs and a float32 weight give float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


def test_a_foreign_layer_with_mixed_dtypes_keeps_its_own_promotion() -> None:
    layer = LlamasNorm(C)
    twin = copy.deepcopy(layer)
    layer, report = convert(layer, return_report=True)
    assert report.changes[0].note == "normally's RMS norm (casting='llama')"
    x = torch.randn(2, 3, C)
    torch.testing.assert_close(layer(x), twin(x))
    half = x.bfloat16()
    found, expected = layer(half), twin(half)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    both = [copy.deepcopy(m).bfloat16()(half) for m in (layer, twin)]
    torch.testing.assert_close(*both, rtol=1e-2, atol=0)  # one unit of bfloat16 is 8e-3
    with torch.autocast("cpu", torch.bfloat16):
        linear = nn.Linear(C, C)
        assert layer(linear(x)).dtype is twin(linear(x)).dtype is torch.float32


def test_a_foreign_activation_that_is_replaced_later_is_called() -> None:
    layer = convert(NormAct(C, nn.ReLU()))
    layer.act = nn.Tanh()
    x = torch.randn(6, C, 3, 3)
    expected = nn.BatchNorm2d(C)(x).tanh()
    torch.testing.assert_close(layer(x), expected)


def test_foreign_running_statistics_are_protected() -> None:
    layer = convert(NormAct(C, nn.ReLU()))
    x = torch.randn(6, C, 3, 3)
    x[0, 1] = torch.nan
    layer(x)
    assert bool(layer.running_mean.isfinite().all())
    assert layer.skipped_updates.item() == 1


def replaced_forward() -> nn.Module:
    layer = nn.BatchNorm2d(C)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


def parametrized() -> nn.Module:
    layer = nn.LayerNorm(C)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def with_dropout() -> nn.Module:
    layer = NormAct(C, nn.ReLU())
    layer.drop = nn.Dropout()
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (replaced_forward(), "its forward was replaced"),
        (parametrized(), "it is parametrized"),
        (with_dropout(), "it drops values before its activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_left_says_why(layer: Any, reason: str) -> None:
    cls = type(layer)
    _, report = convert(nn.Sequential(layer), return_report=True)
    (change,) = report.left
    assert reason in change.note
    assert type(layer) is cls


def test_selection_and_report() -> None:
    model, report = convert(Residual(), only="blocks", skip="*.bn2", return_report=True)
    assert [c.path for c in report.changed] == [
        "blocks.0.bn1",
        "blocks.0.downsample.1",
        "blocks.1.bn1",
    ]
    assert str(report).splitlines()[0] == "convert: 3 changed, 0 left as they were"
    assert type(model.stem[1]) is nn.BatchNorm2d
    _, report = convert(model, return_report=True)  # what is ours already is no line
    assert [c.path for c in report.changes] == ["stem.1", "blocks.0.bn2", "blocks.1.bn2"]
    _, report = revert(model, only="stem", return_report=True)
    assert [str(c) for c in report.changes] == ["stem.1  BatchNorm2d → torch's BatchNorm2d"]


def test_ours_stay_ours() -> None:
    layer = normally.nn.BatchNorm2d(C, act="relu")
    assert revert(convert(layer)) is layer
    assert type(layer) is normally.nn.BatchNorm2d
    assert layer.act == "relu"


def test_a_synchronized_layer_is_not_reverted_silently() -> None:
    model = normally.convert_sync_batchnorm(convert(nn.Sequential(nn.BatchNorm2d(C))))
    _, report = revert(model, return_report=True)
    assert "revert_sync_batchnorm comes first" in report.left[0].note
    revert(normally.revert_sync_batchnorm(model))
    assert type(model[0]) is nn.BatchNorm2d

"""State dicts both ways, copies, moves between dtypes and devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch

from normally import nn
from tests.helpers import DEVICE, assert_same_bits, values

SHAPES = {"BatchNorm1d": (6, 3, 4), "BatchNorm2d": (6, 3, 4, 2), "BatchNorm3d": (6, 3, 2, 1, 2)}
NAMES = tuple(SHAPES)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


def trained(layer: torch.nn.Module, shape: tuple[int, ...], steps: int = 2) -> torch.nn.Module:
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter)
    for seed in range(steps):
        layer(values(shape, torch.float32, seed=seed))
    return layer


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for key, value in first.items():
        assert_same_bits(second[key], value, key)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_strict_load_from_torch_and_back(name: str, options: str) -> None:
    theirs = trained(getattr(torch.nn, name)(3, **OPTIONS[options]), SHAPES[name])
    ours = getattr(nn, name)(3, **OPTIONS[options])
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    assert_same_state(theirs, ours)
    trained(ours, SHAPES[name])
    back = getattr(torch.nn, name)(3, **OPTIONS[options])
    assert back.load_state_dict(ours.state_dict(), strict=True) == ([], [])
    assert_same_state(ours, back)
    assert ours.state_dict()._metadata == back.state_dict()._metadata


def test_strict_load_names_what_is_missing_and_what_is_too_much() -> None:
    layer = nn.BatchNorm2d(3)
    state = layer.state_dict()
    state["weights"] = state.pop("weight")
    with pytest.raises(
        RuntimeError, match=r'Missing key.* "weight"[\s\S]*Unexpected key.*"weights"'
    ):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False) == (["weight"], ["weights"])
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("nested", [False, True])
def test_the_old_version_without_num_batches_tracked(nested: bool) -> None:
    """torch before 0.4.1 had no counter: it loads strictly and keeps the layer's own."""
    for family in (torch.nn, nn):
        layer = trained(family.BatchNorm2d(3), SHAPES["BatchNorm2d"])
        model = torch.nn.Sequential(torch.nn.Identity(), layer) if nested else layer
        old = OrderedDict(
            (key, value + 1)
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        )
        assert model.load_state_dict(old, strict=True) == ([], [])
        assert layer.num_batches_tracked.item() == 2
        assert torch.equal(layer.running_mean, old["1.running_mean" if nested else "running_mean"])
    fresh = nn.BatchNorm2d(3, momentum=None)
    fresh.load_state_dict(OrderedDict((k.removeprefix("1."), v) for k, v in old.items()))
    assert fresh.num_batches_tracked.item() == 0


def test_a_new_version_without_the_counter_is_refused() -> None:
    layer = nn.BatchNorm2d(3)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(state)


def test_state_dict_through_a_file_that_holds_weights_only() -> None:
    layer = trained(nn.BatchNorm2d(3, act="relu"), SHAPES["BatchNorm2d"])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = nn.BatchNorm2d(3, act="relu")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(layer, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_is_whole_and_apart(way: str, name: str) -> None:
    options: dict[str, Any] = {
        "eps": 1e-3, "momentum": 0.3, "act": "elu", "act_param": 0.5, "unbiased": False,
        "correction": 1, "on_single_value": "running", "bias": False,
    }  # fmt: skip
    layer = trained(getattr(nn, name)(3, **options), SHAPES[name])
    bad = values(SHAPES[name], torch.float32)
    bad[0, 1] = torch.nan
    layer(bad)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif way == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert repr(other) == repr(layer)
    assert other.skipped_updates.item() == 1
    before = copy.deepcopy(layer.state_dict())
    x = values(SHAPES[name], torch.float32, seed=5)
    y = other(x)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], f"{key} is shared")
    assert_same_bits(y, layer(x))
    assert_same_state(layer, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    layer = trained(nn.BatchNorm2d(3), SHAPES["BatchNorm2d"])
    kept = copy.deepcopy(layer.state_dict())
    layer.to(dtype).eval()
    for key, value in layer.state_dict().items():
        assert_same_bits(value, kept[key].to(value.dtype), key)
        assert value.dtype is (torch.long if key == "num_batches_tracked" else dtype)
    assert layer(values(SHAPES["BatchNorm2d"], dtype)).dtype is dtype
    assert layer.skipped_updates.dtype is torch.long


@pytest.mark.parametrize("momentum", [0.1, None])
def test_meta_then_empty_then_loaded(momentum: float | None) -> None:
    source = trained(nn.BatchNorm2d(3, momentum=momentum), SHAPES["BatchNorm2d"])
    with torch.device("meta"):
        layer = nn.BatchNorm2d(3, momentum=momentum)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.randn(2, 3, 4, 4, device="meta")).is_meta
    layer.to_empty(device=DEVICE)
    for tensor in layer.buffers():  # what memory happened to hold
        tensor.fill_(77)
    layer.load_state_dict(source.state_dict())
    check_like_new(source, layer)


def check_like_new(source: torch.nn.Module, layer: torch.nn.Module) -> None:
    assert layer.skipped_updates.item() == 0
    assert not layer.skipped_updates.is_meta
    x = values(SHAPES["BatchNorm2d"], torch.float32, seed=4)
    assert_same_bits(layer(x), source(x))
    assert_same_state(source, layer)


def test_meta_then_assigned() -> None:
    source = trained(nn.BatchNorm2d(3, momentum=None), SHAPES["BatchNorm2d"])
    with torch.device("meta"):
        layer = nn.BatchNorm2d(3, momentum=None)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    check_like_new(source, layer)


def test_meta_then_empty_then_reset() -> None:
    with torch.device("meta"):
        layer = nn.BatchNorm2d(3)
    layer.to_empty(device=DEVICE)
    for tensor in layer.buffers():
        tensor.fill_(77)
    layer.reset_parameters()
    check_like_new(nn.BatchNorm2d(3), layer)


def test_a_state_dict_of_a_model_with_torchs_layers_fits_one_with_ours() -> None:
    def model(family: Any) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), family.BatchNorm2d(4), torch.nn.Flatten(),
            torch.nn.Linear(16, 5), family.BatchNorm1d(5),
        )  # fmt: skip

    theirs, ours = model(torch.nn), model(nn)
    x = torch.randn(8, 1, 4, 4)
    theirs(x)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.train()(x).square().sum().backward()
    optimizer.step()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))

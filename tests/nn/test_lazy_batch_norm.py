"""LazyBatchNorm1d, 2d, 3d: sizes from the first input, from a state dict, or not yet."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normally import nn
from tests.helpers import assert_same_bits, values

SHAPES = {"BatchNorm1d": (6, 3, 4), "BatchNorm2d": (6, 3, 4, 2), "BatchNorm3d": (6, 3, 2, 1, 2)}
NAMES = tuple(SHAPES)


def lazy(name: str, **options: Any) -> Any:
    return getattr(nn, f"Lazy{name}")(**options)


def is_lazy(layer: torch.nn.Module) -> bool:
    return any(
        isinstance(t, UninitializedParameter | UninitializedBuffer)
        for t in (*layer.parameters(), *layer.buffers())
    )


@pytest.mark.parametrize("options", [
    {}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None},
    {"act": "silu", "unbiased": False, "correction": 1}, {"dtype": torch.float64},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_the_first_input_makes_the_plain_layer(name: str, options: dict[str, Any]) -> None:
    layer = lazy(name, **options)
    plain = getattr(nn, name)(3, **options)
    for seed in range(2):
        x = values(SHAPES[name], options.get("dtype", torch.float32), seed=seed)
        assert_same_bits(layer(x), plain(x))
    assert type(layer) is type(plain)
    assert repr(layer) == repr(plain)
    assert not is_lazy(layer)
    for key, value in plain.state_dict().items():
        assert_same_bits(layer.state_dict()[key], value, key)
    assert not layer._forward_pre_hooks
    assert not layer._load_state_dict_pre_hooks


def test_the_channel_dim_gives_the_size() -> None:
    layer = nn.LazyBatchNorm1d(channel_dim=-1)
    layer(torch.randn(6, 4, 3))
    assert layer.num_features == 3
    assert layer.weight.shape == layer.running_var.shape == (3,)


def test_residual_and_keywords_in_the_first_call() -> None:
    x, residual = values((6, 3, 4), torch.float32), torch.randn(6, 3, 4)
    expected = nn.BatchNorm1d(3, act="relu")(x, residual)
    assert_same_bits(nn.LazyBatchNorm1d(act="relu")(x, residual), expected)
    assert_same_bits(nn.LazyBatchNorm1d(act="relu")(x, residual=residual), expected)
    assert_same_bits(nn.LazyBatchNorm1d(act="relu")(input=x, residual=residual), expected)
    assert_same_bits(nn.LazyBatchNorm1d(act="relu")(residual=residual, input=x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_gives_the_size(name: str) -> None:
    for family in (torch.nn, nn):
        source = getattr(family, name)(3)
        source(values(SHAPES[name], torch.float32))
        layer = lazy(name)
        layer.load_state_dict(source.state_dict(), strict=True)
        assert not is_lazy(layer)
        x = values(SHAPES[name], torch.float32, seed=1)
        torch.testing.assert_close(layer(x), source(x))
        assert type(layer) is getattr(nn, name)
        for key, value in source.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)


def test_a_state_dict_gives_num_features_too() -> None:
    layer = nn.LazyBatchNorm2d()
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    layer(values((6, 3, 4, 2), torch.float32))
    assert layer.num_features == 3
    layer.reset_parameters()
    assert torch.equal(layer.running_mean, torch.zeros(3))


# No deepcopy: torch's uninitialized buffers have none.
@pytest.mark.parametrize("way", ["state dict", "pickle"])
def test_not_yet_is_kept(way: str) -> None:
    layer = nn.LazyBatchNorm2d(act="relu")
    if way == "state dict":
        other = nn.LazyBatchNorm2d(act="relu")
        other.load_state_dict(layer.state_dict(), strict=True)
    else:
        other = pickle.loads(pickle.dumps(layer))
    assert is_lazy(other)
    assert type(other) is nn.LazyBatchNorm2d
    x = values((6, 3, 4, 2), torch.float32)
    assert_same_bits(other(x), layer(x))
    assert type(other) is nn.BatchNorm2d


def test_a_lazy_state_dict_does_not_fit_a_layer_with_a_size() -> None:
    with pytest.raises(RuntimeError, match="uninitialized"):
        nn.BatchNorm2d(3).load_state_dict(nn.LazyBatchNorm2d().state_dict())


def test_to_a_dtype_before_the_first_input() -> None:
    layer = nn.LazyBatchNorm1d().double()
    layer(values((6, 3), torch.float64))
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float64, torch.long}


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_first_input_is_refused_and_leaves_the_layer_usable(name: str) -> None:
    layer = lazy(name)
    wrong = torch.randn(2, 3, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"input \(got 6D input\)"):
        layer(wrong)
    fresh = lazy(name)
    with pytest.raises(IndexError):
        fresh(torch.tensor(1.0))
    assert is_lazy(fresh)
    fresh(torch.randn(SHAPES[name]))


def test_a_channel_dim_of_minus_one_and_a_state_dict() -> None:
    layer = nn.LazyBatchNorm1d(channel_dim=-1)
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    layer(torch.randn(6, 4, 3))
    with pytest.raises(ValueError, match="should contain 5 elements not 3"):
        layer(torch.randn(6, 4, 5))


def test_skipped_updates_before_and_after() -> None:
    layer = nn.LazyBatchNorm1d()
    assert layer.skipped_updates.item() == 0
    x = torch.randn(6, 3)
    x[0, 1] = torch.nan
    layer(x)
    assert layer.skipped_updates.item() == 1

"""`create_norm`: the names of this library, of detectron2 and of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import normally
from normally import nn
from normally.nn import create_norm

LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "batch": (nn.BatchNorm2d, {}),
    "batch1d": (nn.BatchNorm1d, {}),
    "batch2d": (nn.BatchNorm2d, {}),
    "batch3d": (nn.BatchNorm3d, {}),
    "instance": (nn.InstanceNorm2d, {}),
    "instance1d": (nn.InstanceNorm1d, {}),
    "instance2d": (nn.InstanceNorm2d, {}),
    "instance3d": (nn.InstanceNorm3d, {}),
    "layer": (nn.LayerNorm, {"normalized_shape": (64,), "dim": None, "eps": 1e-5}),
    "layer2d": (nn.LayerNorm, {"normalized_shape": (64,), "dim": 1, "eps": 1e-6}),
    "rms": (nn.RMSNorm, {"normalized_shape": (64,)}),
    "group": (nn.GroupNorm, {"num_groups": 32}),
    "group:8": (nn.GroupNorm, {"num_groups": 8}),
    "frozen": (nn.FrozenBatchNorm, {}),
    "lrn": (nn.LocalResponseNorm, {"size": 5}),
    "lrn:3": (nn.LocalResponseNorm, {"size": 3}),
    # detectron2
    "BN": (nn.BatchNorm2d, {}),
    "GN": (nn.GroupNorm, {"num_groups": 32}),
    "LN": (nn.LayerNorm, {"dim": 1, "eps": 1e-6}),
    "FrozenBN": (nn.FrozenBatchNorm, {}),
    # timm
    "batchnorm": (nn.BatchNorm2d, {}),
    "batchnorm1d": (nn.BatchNorm1d, {}),
    "batchnorm2d": (nn.BatchNorm2d, {}),
    "groupnorm": (nn.GroupNorm, {"num_groups": 32}),
    "groupnorm1": (nn.GroupNorm, {"num_groups": 1}),
    "layernorm": (nn.LayerNorm, {"dim": None}),
    "layernorm2d": (nn.LayerNorm, {"dim": 1, "eps": 1e-6}),
    "layernormfp32": (nn.LayerNorm, {"dim": None}),
    "layernorm2dfp32": (nn.LayerNorm, {"dim": 1}),
    "rmsnorm": (nn.RMSNorm, {}),
    "rmsnormfp32": (nn.RMSNorm, {}),
    "frozenbatchnorm2d": (nn.FrozenBatchNorm, {}),
    # classes
    "BatchNorm3d": (nn.BatchNorm3d, {}),
    "InstanceNorm1d": (nn.InstanceNorm1d, {}),
    "RMSNorm": (nn.RMSNorm, {}),
    "GroupNorm:16": (nn.GroupNorm, {"num_groups": 16}),
    "LocalResponseNorm": (nn.LocalResponseNorm, {"size": 5}),
    "FrozenBatchNorm": (nn.FrozenBatchNorm, {}),
    "batch_norm": (nn.BatchNorm2d, {}),
    "Instance-Norm 3d": (nn.InstanceNorm3d, {}),
    "IN": (nn.InstanceNorm2d, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_names(name: str) -> None:
    kind, attributes = LAYERS[name]
    for spelled in (name, name.upper(), name.lower()):
        layer = create_norm(spelled, 64)
        assert type(layer) is kind
        for attribute, value in attributes.items():
            assert getattr(layer, attribute) == value
    if hasattr(layer, "num_features"):
        assert layer.num_features == 64
    if hasattr(layer, "weight") and layer.weight is not None:
        assert layer.weight.shape == (64,)


def test_it_is_public_in_both_places() -> None:
    assert normally.create_norm is create_norm


@pytest.mark.parametrize(
    "name", ["sync", "SyncBatchNorm", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"]
)
def test_synchronized(name: str) -> None:
    layer = create_norm(name, 8, act="relu")
    assert type(layer) is nn.SyncBatchNorm
    assert (layer.num_features, layer.act) == (8, "relu")


def test_options_go_to_the_layer() -> None:
    assert type(create_norm("batch", 8, dim=1)) is nn.BatchNorm1d
    assert type(create_norm("instance", 8, dim=3)) is nn.InstanceNorm3d
    assert create_norm("layer", 8, dim=2).dim == 2
    assert create_norm("group", 8, num_groups=4, act="silu").num_groups == 4
    assert create_norm("LN", 8, eps=1e-3).eps == 1e-3
    assert create_norm("rms", 8, casting="llama").casting == "llama"
    assert create_norm("lrn", 8, size=7, k=2.0).k == 2.0
    assert create_norm("frozen", 8, dtype=torch.float64).weight.dtype is torch.float64
    with pytest.raises(TypeError, match="momentum"):
        create_norm("rms", 8, momentum=0.1)
    with pytest.raises(ValueError, match=r"num_channels \(8\) must be divisible by num_groups"):
        create_norm("group", 8)
    with pytest.raises(ValueError, match="dim must be 1, 2 or 3"):
        create_norm("batch", 8, dim=4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bacth2d", "did you mean 'batch2d'?"),
        ("grouped", "did you mean 'group'?"),
        ("qwertz", r"Got name='qwertz'\.$"),
        ("", r"Got name=''\.$"),
        ("rmsnorm2d", "use 'rms' on a channels-last input"),
    ],
)
def test_unknown_names_list_what_there_is(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        create_norm(name, 8)
    for known in ("'batch'", "'layer2d'", "'group'", "'frozen'", "'lrn'"):
        assert known in str(error.value)


@pytest.mark.parametrize("name", ["group:", "group:x", "group:-1", "batch:3", "groupnorm1:2:3"])
def test_numbers_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match="a number after the colon"):
        create_norm(name, 8)


def test_a_number_twice() -> None:
    with pytest.raises(ValueError, match="a number after the colon"):
        create_norm("group:4", 8, num_groups=2)


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="name must be a string"):
        create_norm(nn.GroupNorm, 8)  # type: ignore[arg-type]

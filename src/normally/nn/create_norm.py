"""`create_norm`: a normalization layer by its name, as configuration files give it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .frozen_batch_norm import FrozenBatchNorm
from .group_norm import GroupNorm
from .instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm
from .local_response_norm import LocalResponseNorm
from .rms_norm import RMSNorm
from .sync_batch_norm import SyncBatchNorm

_BATCH = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
_INSTANCE = {1: InstanceNorm1d, 2: InstanceNorm2d, 3: InstanceNorm3d}


def create_norm(name: str, num_features: int, **options: Any) -> torch.nn.Module:
    """A normalization layer for `num_features` channels, by name.

    Neither case nor separators matter, nor whether a name says "norm": "BatchNorm2d", "batch_2d"
    and "batch2d" are one.

    | name | layer |
    | --- | --- |
    | "batch1d", "batch2d", "batch3d" | `BatchNorm1d`, 2d, 3d |
    | "batch" | the same with `dim=` 1, 2 (default) or 3 |
    | "instance1d", "instance2d", "instance3d", "instance" | `InstanceNorm1d`, 2d, 3d, likewise |
    | "layer" | `LayerNorm` over the last dimension, or `dim=` |
    | "layer2d" | `LayerNorm` over dimension 1, eps=1e-6, as timm's |
    | "rms" | `RMSNorm` over the last dimension |
    | "group", "group:8" | `GroupNorm` with `num_groups=` 32 (default), or 8 |
    | "sync" | `SyncBatchNorm` |
    | "frozen" | `FrozenBatchNorm` |
    | "lrn", "lrn:5" | `LocalResponseNorm` with `size=` 5 (default); it needs no `num_features` |

    Other names of these are detectron2's "BN", "GN", "FrozenBN", "LN" (which is "layer2d") and
    "SyncBN", "nnSyncBN", "naiveSyncBN" (all "sync", which weighs processes by their values), "IN",
    and timm's "groupnorm1" ("group:1"), "frozenbatchnorm2d", and those ending in "fp32", which
    these layers' arithmetic is anyway.

    Args:
        name: see above.
        num_features: C.
        options: what the layer's constructor takes, by keyword.

    Returns:
        The layer.

    Raises:
        ValueError: for a name that there is not; the message lists those that there are.
        TypeError: for an option that the layer does not take.

    >>> create_norm("group:8", 64, act="silu")
    GroupNorm(8, 64, eps=1e-05, affine=True, bias=True, act='silu')
    >>> create_norm("BN", 64)
    BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    if not isinstance(name, str):
        raise TypeError(f"create_norm: name must be a string. Got {type(name).__name__}.")
    base, colon, number = name.partition(":")
    key = _key(base)
    if key in _ALIASES:
        alias, _, implied = _ALIASES[key].partition(":")
        key, number = alias, number or implied
    if key not in _MAKERS:
        raise _unknown(name, key)
    if number or colon:
        keyword = _NUMBERED.get(key)
        if keyword is None or not number.isdecimal() or keyword in options:
            raise ValueError(
                f"create_norm: name must be one of {_NAMES}, a number after the colon being "
                f"num_groups or size. Got name={name!r}, options={options}."
            )
        options[keyword] = int(number)
    return _MAKERS[key](num_features, **options)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()).replace("norm", "")


def _of_dim(layers: dict[int, Any]) -> Callable[..., torch.nn.Module]:
    def make(num_features: int, *, dim: int = 2, **options: Any) -> torch.nn.Module:
        if dim not in layers:
            raise ValueError(
                "create_norm: dim must be 1, 2 or 3, how many dimensions follow the channels. "
                f"Got dim={dim}."
            )
        layer: torch.nn.Module = layers[dim](num_features, **options)
        return layer

    return make


def _layer_2d(num_features: int, *, eps: float = 1e-6, **options: Any) -> torch.nn.Module:
    return LayerNorm(num_features, eps, dim=1, **options)


def _group(num_features: int, *, num_groups: int = 32, **options: Any) -> torch.nn.Module:
    return GroupNorm(num_groups, num_features, **options)


def _local_response(num_features: int, *, size: int = 5, **options: Any) -> torch.nn.Module:
    return LocalResponseNorm(size, **options)


_MAKERS: dict[str, Callable[..., torch.nn.Module]] = {
    "batch": _of_dim(_BATCH),
    **{f"batch{dim}d": layer for dim, layer in _BATCH.items()},
    "instance": _of_dim(_INSTANCE),
    **{f"instance{dim}d": layer for dim, layer in _INSTANCE.items()},
    "layer": LayerNorm,
    "layer2d": _layer_2d,
    "rms": RMSNorm,
    "group": _group,
    "frozen": FrozenBatchNorm,
    "sync": SyncBatchNorm,
    "lrn": _local_response,
}
_NAMES = ", ".join(repr(name) for name in _MAKERS)

#: What the number after the colon is.
_NUMBERED = {"group": "num_groups", "lrn": "size"}

_ALIASES = {
    "bn": "batch2d",
    **{f"bn{dim}d": f"batch{dim}d" for dim in _BATCH},
    "frozenbn": "frozen",
    "frozenbatch": "frozen",
    **{f"frozenbatch{dim}d": "frozen" for dim in _BATCH},
    "syncbn": "sync",
    "syncbatch": "sync",
    "nnsyncbn": "sync",
    "naivesyncbn": "sync",
    "naivesyncbnn": "sync",
    "gn": "group",
    "group1": "group:1",
    "in": "instance2d",
    **{f"in{dim}d": f"instance{dim}d" for dim in _INSTANCE},
    "ln": "layer2d",
    "layerfp32": "layer",
    "layer2dfp32": "layer2d",
    "rmsfp32": "rms",
    "localresponse": "lrn",
}


def _unknown(name: str, key: str) -> ValueError:
    message = f"create_norm: name must be one of {_NAMES}, or another library's. Got name={name!r}"
    if key.startswith("rms2d"):
        return ValueError(
            f"{message}; RMSNorm is over the last dimension: use 'rms' on a channels-last input."
        )
    near = difflib.get_close_matches(key, [*_MAKERS, *_ALIASES], n=1)
    return ValueError(f"{message}; did you mean {near[0]!r}?" if near else f"{message}.")

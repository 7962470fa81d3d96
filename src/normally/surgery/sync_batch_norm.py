"""`convert_sync_batchnorm` and `revert_sync_batchnorm`."""

from __future__ import annotations

from typing import Any

import torch

from ..nn import SyncBatchNorm
from ..nn._sync_conversion import revert


def convert_sync_batchnorm(model: torch.nn.Module, group: Any = None) -> torch.nn.Module:
    """Make every batch norm of `model` a `normally.nn.SyncBatchNorm`, in place.

    A layer changes its class and remembers which it had; it stays the same object. So parameters
    (an optimizer made before still holds them), buffers, hooks, the training flag, activations and
    other options, and attributes of one's own stay as they are. torch's function replaces the
    layers by others, and loses hooks and attributes.

    torch's `BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm`, ours, the lazy ones, and subclasses of
    these that define nothing but a constructor are converted; layers that were before stay so. What
    was made by torch's function is not a `normally.nn.SyncBatchNorm` yet, and becomes one.

    Args:
        model: any module, a batch norm itself included, before or after wrapping in
            DistributedDataParallel; before `fully_shard`.
        group: the processes that share statistics; None is the default group, and for layers that
            are in a group already (torch's SyncBatchNorm) that one. Every process of the group must
            convert.

    Returns:
        `model`.

    Raises:
        TypeError: for batch norms of other classes, whose own methods would be lost; the message
            names all of them, and nothing is changed. And if `group` is no process group.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    >>> convert_sync_batchnorm(model)[1]
    SyncBatchNorm(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> type(revert_sync_batchnorm(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    return SyncBatchNorm.convert_sync_batchnorm(model, group)


def revert_sync_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Give every converted layer of `model` its class back, in place.

    The classes are those from before, and what the conversion added is gone: bit for bit the layer
    that would be there without it, with the statistics and parameters that it has learned since. A
    lazy layer that has met its first input becomes what it would have become. Layers that were made
    as `SyncBatchNorm` stay what they are.

    Args:
        model: any module.

    Returns:
        `model`.
    """
    return revert(model)

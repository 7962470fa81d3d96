"""torch's normalization layers and what each becomes."""

from __future__ import annotations

import torch

from .. import nn

#: By torch's class. A subclass that changes nothing of it counts as it.
COUNTERPARTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    theirs: getattr(nn, theirs.__name__)
    for theirs in (
        torch.nn.BatchNorm1d,
        torch.nn.BatchNorm2d,
        torch.nn.BatchNorm3d,
        torch.nn.LazyBatchNorm1d,
        torch.nn.LazyBatchNorm2d,
        torch.nn.LazyBatchNorm3d,
        torch.nn.SyncBatchNorm,
        torch.nn.InstanceNorm1d,
        torch.nn.InstanceNorm2d,
        torch.nn.InstanceNorm3d,
        torch.nn.LazyInstanceNorm1d,
        torch.nn.LazyInstanceNorm2d,
        torch.nn.LazyInstanceNorm3d,
        torch.nn.LayerNorm,
        torch.nn.RMSNorm,
        torch.nn.GroupNorm,
        torch.nn.LocalResponseNorm,
    )
}

#: Classes of ours, which stay what they are.
OURS = tuple(
    cls
    for cls in map(nn.__dict__.get, nn.__all__)
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module)
)

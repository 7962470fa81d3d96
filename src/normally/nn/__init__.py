"""The layers: parameters and buffers. The maths is in `normally.functional`."""

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .lazy_batch_norm import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

"""normally: the normalization layers of PyTorch, faster, exact, and explained."""

from . import distributed, functional, nn, reference
from ._native import backends
from .nn import create_norm
from .surgery import (
    accumulate,
    adapt,
    convert,
    convert_sync_batchnorm,
    fold,
    freeze,
    fuse,
    norm_param_groups,
    recalibrate,
    replace,
    revert,
    revert_sync_batchnorm,
    unfreeze,
)

__all__ = [
    "__version__",
    "accumulate",
    "adapt",
    "backends",
    "convert",
    "convert_sync_batchnorm",
    "create_norm",
    "distributed",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "nn",
    "norm_param_groups",
    "recalibrate",
    "reference",
    "replace",
    "revert",
    "revert_sync_batchnorm",
    "unfreeze",
]
__version__ = "0.1.0"

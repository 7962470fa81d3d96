"""The operators: schema, shape function, autograd, and the choice of a backend, one file each.

Importing this package defines every `torch.ops.normally` operator and then loads the compiled
kernels, which register themselves against those definitions.
"""

from .. import _native
from . import (
    batch_norm,
    batch_norm_autograd,
    batch_norm_transforms,
    decompositions,
    frozen_batch_norm,
    group_norm,
    layer_norm,
    local_response_norm,
    rms_norm,
    running_stats,
    sync_batch_norm,
)

_native.load()

__all__ = [
    "batch_norm",
    "batch_norm_autograd",
    "batch_norm_transforms",
    "decompositions",
    "frozen_batch_norm",
    "group_norm",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
    "running_stats",
    "sync_batch_norm",
]

"""Operations on whole models."""

from ._pairs.folding import FoldedNorm
from ._pairs.fusing import FusedActivation
from ._report import Change, Report
from .accumulate import Accumulation, Lockstep, accumulate
from .adapt import adapt
from .convert import convert, revert
from .fold import fold
from .freeze import freeze, unfreeze
from .fuse import fuse
from .norm_param_groups import norm_param_groups
from .recalibrate import recalibrate
from .replace import replace
from .sync_batch_norm import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = [
    "Accumulation",
    "Change",
    "FoldedNorm",
    "FusedActivation",
    "Lockstep",
    "Report",
    "accumulate",
    "adapt",
    "convert",
    "convert_sync_batchnorm",
    "fold",
    "freeze",
    "fuse",
    "norm_param_groups",
    "recalibrate",
    "replace",
    "revert",
    "revert_sync_batchnorm",
    "unfreeze",
]

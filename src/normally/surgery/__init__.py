"""Operations on whole models."""

from ._report import Change, Report
from .accumulate import Accumulation, Lockstep, accumulate
from .convert import convert, revert
from .sync_batch_norm import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = [
    "Accumulation",
    "Change",
    "Lockstep",
    "Report",
    "accumulate",
    "convert",
    "convert_sync_batchnorm",
    "revert",
    "revert_sync_batchnorm",
]

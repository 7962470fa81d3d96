"""Operations on whole models."""

from .accumulate import Accumulation, Lockstep, accumulate
from .sync_batch_norm import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = [
    "Accumulation",
    "Lockstep",
    "accumulate",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
]

"""The batch norm layers that take `num_features` from their first input."""

from __future__ import annotations

import torch
from torch import Tensor

from ._lazy import LazyNorm
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm


class _LazyBatchNorm(LazyNorm, _BatchNorm):
    """What the lazy layers share: `num_features` comes from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        act_param: float | None = None,
        channel_dim: int = 1,
        unbiased: bool = True,
        correction: int = 0,
        on_single_value: str = "error",
        memory_efficient: bool = False,
    ) -> None:
        self._start_lazily(bias, eps, momentum, affine, track_running_stats, device, dtype)
        self._configure(
            act, act_param, channel_dim, unbiased, correction, on_single_value, memory_efficient
        )

    def initialize_parameters(self, input: Tensor, *args: object, **kwargs: object) -> None:
        """Take `num_features` from the first input and create parameters and buffers."""
        self._take_features(input.shape[self.channel_dim])


class LazyBatchNorm1d(_LazyBatchNorm, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d` that takes `num_features` from its first input.

    >>> layer = LazyBatchNorm1d()
    >>> _ = layer(torch.rand(4, 3))
    >>> type(layer).__name__, layer.num_features
    ('BatchNorm1d', 3)
    """

    cls_to_become = BatchNorm1d
    _check_input_dim = BatchNorm1d._check_input_dim


class LazyBatchNorm2d(_LazyBatchNorm, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm2d
    _check_input_dim = BatchNorm2d._check_input_dim


class LazyBatchNorm3d(_LazyBatchNorm, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d` that takes `num_features` from its first input."""

    cls_to_become = BatchNorm3d
    _check_input_dim = BatchNorm3d._check_input_dim

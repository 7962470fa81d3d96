"""The instance norm layers that take `num_features` from their first input."""

from __future__ import annotations

import torch
from torch import Tensor

from ._lazy import LazyNorm
from ._location import located
from .instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, _InstanceNorm


class _LazyInstanceNorm(LazyNorm, _InstanceNorm):
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
    ) -> None:
        self._start_lazily(bias, eps, momentum, affine, track_running_stats, device, dtype)
        self._configure(act, act_param)

    def initialize_parameters(self, input: Tensor, *args: object, **kwargs: object) -> None:
        """Take `num_features` from the first input, with or without a batch."""
        try:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise located(error, self) from None
        channel_dim = input.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        self._take_features(input.shape[channel_dim])


class LazyInstanceNorm1d(_LazyInstanceNorm, torch.nn.LazyInstanceNorm1d):
    """`InstanceNorm1d` that takes `num_features` from its first input.

    Its defaults are torch's: affine and with running statistics, unlike `InstanceNorm1d`.

    >>> layer = LazyInstanceNorm1d()
    >>> _ = layer(torch.rand(4, 3, 5))
    >>> type(layer).__name__, layer.num_features
    ('InstanceNorm1d', 3)
    """

    cls_to_become = InstanceNorm1d
    _check_input_dim = InstanceNorm1d._check_input_dim


class LazyInstanceNorm2d(_LazyInstanceNorm, torch.nn.LazyInstanceNorm2d):
    """`InstanceNorm2d` that takes `num_features` from its first input."""

    cls_to_become = InstanceNorm2d
    _check_input_dim = InstanceNorm2d._check_input_dim


class LazyInstanceNorm3d(_LazyInstanceNorm, torch.nn.LazyInstanceNorm3d):
    """`InstanceNorm3d` that takes `num_features` from its first input."""

    cls_to_become = InstanceNorm3d
    _check_input_dim = InstanceNorm3d._check_input_dim

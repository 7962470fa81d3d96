"""InstanceNorm1d, 2d and 3d: torch's, with masks, an activation and protected statistics."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import functional
from .._ops import activation
from ._location import dims_error, located
from ._options import activation_of, shown
from ._skipped_updates import CountsSkippedUpdates, warn_of_half_statistics
from ._tracing import traced


class _InstanceNorm(CountsSkippedUpdates, torch.nn.modules.instancenorm._InstanceNorm):
    """What the layers add to torch's."""

    act: str | None = None
    act_param: float | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        act_param: float | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:
            self.register_parameter("bias", None)
        self._configure(act, act_param)
        self._count_skipped_updates()

    def _configure(self, act: str | None, act_param: float | None) -> None:
        """Check and keep the options that torch does not have."""
        activation.encode(act, act_param, type(self).__name__)
        self.act = act
        self.act_param = act_param

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """act(in(input)); see `normally.functional.instance_norm`.

        `act` and `act_param` are the activation of this call, for a layer that has none.
        """
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(self, input, mask=mask, lengths=lengths, act=act, act_param=act_param)
        try:
            fused = activation_of(self, act, act_param)
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            channel_dim = input.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call]
            if input.shape[channel_dim] != self.num_features:
                self._meet_other_features(input, channel_dim)
            if channel_dim == 1:
                return self._normalize(input, mask, lengths, *fused)
            if lengths is not None and lengths.dim() == 0:
                lengths = lengths.unsqueeze(0)
            return self._normalize(input.unsqueeze(0), mask, lengths, *fused).squeeze(0)
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def _normalize(
        self,
        input: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        act: str | None,
        act_param: float | None,
    ) -> Tensor:
        running_mean = self.running_mean
        if running_mean is not None and self.training and running_mean.dtype is torch.float16:
            warn_of_half_statistics(self)
        return functional.instance_norm(
            input, running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum, self.eps,
            act=act, act_param=act_param, mask=mask, lengths=lengths,
            num_batches_tracked=self._buffers.get("num_batches_tracked"),
            skipped_updates=self._buffers.get("_skipped_updates"),
        )  # fmt: skip

    def _meet_other_features(self, input: Tensor, channel_dim: int) -> None:
        found = input.shape[channel_dim]
        if self.affine:
            raise ValueError(
                f"expected input's size at dim={channel_dim} to match num_features"
                f" ({self.num_features}), but got: {found}."
            )
        if self.running_mean is None and not torch.compiler.is_compiling():
            warnings.warn(
                f"input's size at dim={channel_dim} does not match num_features. "
                "You can silence this warning by not passing in num_features, "
                "which is not used because affine=False",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """torch's, then what differs from torch's defaults."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return text + shown(self, act=None, act_param=None)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    r"""Instance normalization of `(N, C, L)` or `(C, L)` (Ulyanov et al. 2016, arXiv:1607.08022).

        y = act((x - mean) / √(var + eps) * weight + bias)

    Mean and biased variance are those of each sample and each channel alone, over L. With
    `track_running_stats` training moves running statistics towards them, and evaluation uses those;
    without, both use the input's. State dicts load from and into `torch.nn.InstanceNorm1d`.

    Unlike torch's, the layer counts its batches in `num_batches_tracked`, and momentum=None really
    accumulates: torch's silently keeps mean 0 and variance 1.

    Args:
        num_features: C.
        eps: added to the variance, in units of x².
        momentum: the weight of the *new* batch in the running statistics; None keeps the plain
            average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers; float32 serves half inputs too.
        bias: learn β; only with `affine`.
        act: an activation fused into the layer, see `normally.functional.instance_norm`.
        act_param: its parameter.

    >>> layer = InstanceNorm1d(1, act="relu")
    >>> layer(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]])).flatten(1)
    tensor([[0.0000, 1.0000],
            [0.0000, 1.0000]])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise dims_error("2D or 3D", input)


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    r"""Instance normalization of `(N, C, H, W)` or `(C, H, W)`: as `InstanceNorm1d`, over H and W.

    channels_last inputs are normalized in their own layout and give channels_last outputs.

    >>> InstanceNorm2d(3)(torch.ones(2, 3, 4, 4)).unique()
    tensor([0.])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (3, 4):
            raise dims_error("3D or 4D", input)


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    r"""Instance normalization of `(N, C, T, H, W)` or `(C, T, H, W)`: as `InstanceNorm1d`.

    >>> InstanceNorm3d(2)(torch.rand(2, 2, 3, 4, 5)).shape
    torch.Size([2, 2, 3, 4, 5])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (4, 5):
            raise dims_error("4D or 5D", input)

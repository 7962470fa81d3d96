"""BatchNorm1d, 2d and 3d.

Subclasses of torch's, so that everything which recognizes those recognizes these, with the same
parameters, buffers and state dict. The maths is `normally.functional.batch_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from .._ops import activation
from ..distributed import Peers
from ._location import dims_error, located
from ._options import activation_of, shown
from ._skipped_updates import CountsSkippedUpdates, warn_of_half_statistics
from ._tracing import traced

_ON_SINGLE_VALUE = ("error", "running")


class _BatchNorm(CountsSkippedUpdates, torch.nn.modules.batchnorm._BatchNorm):
    """What the layers add to torch's: options, a protected update, one fused call."""

    # What a layer of torch's has that becomes one of these.
    act: str | None = None
    act_param: float | None = None
    channel_dim: int = 1
    unbiased: bool = True
    correction: int = 0
    on_single_value: str = "error"
    memory_efficient: bool = False

    def __init__(
        self,
        num_features: int,
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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._configure(
            act, act_param, channel_dim, unbiased, correction, on_single_value, memory_efficient
        )
        self._count_skipped_updates()

    def _configure(
        self,
        act: str | None,
        act_param: float | None,
        channel_dim: int,
        unbiased: bool,
        correction: int,
        on_single_value: str,
        memory_efficient: bool,
    ) -> None:
        """Check and keep the options that torch does not have."""
        caller = type(self).__name__
        activation.encode(act, act_param, caller)
        if on_single_value not in _ON_SINGLE_VALUE:
            raise ValueError(
                f"{caller}: on_single_value must be 'error' or 'running'. "
                f"Got on_single_value={on_single_value!r}."
            )
        if correction < 0:
            raise ValueError(
                f"{caller}: correction must be 0 or more. Got correction={correction}."
            )
        self.act = act
        self.act_param = act_param
        self.channel_dim = channel_dim
        self.unbiased = unbiased
        self.correction = correction
        self.on_single_value = on_single_value
        self.memory_efficient = memory_efficient

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """act(bn(input) + residual); see `normally.functional.batch_norm`.

        `act` and `act_param` are the activation of this call, for a layer that has none.
        """
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(
                self, input, residual=residual, mask=mask, lengths=lengths, act=act,
                act_param=act_param,
            )  # fmt: skip
        try:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            training = self.training
            running_mean, running_var = self.running_mean, self.running_var
            tracks = self.track_running_stats or not training
            if running_mean is not None and training and running_mean.dtype is torch.float16:
                warn_of_half_statistics(self)
            act, act_param = activation_of(self, act, act_param)
            return functional.batch_norm(
                input,
                running_mean if tracks else None,
                running_var if tracks else None,
                self.weight,
                self.bias,
                training or (running_mean is None and running_var is None),
                self.momentum,
                self.eps,
                act=act,
                act_param=act_param,
                residual=residual,
                mask=mask,
                lengths=lengths,
                channel_dim=self.channel_dim,
                unbiased=self.unbiased,
                correction=self.correction,
                on_single_value=self.on_single_value,
                group=self._peers(),
                memory_efficient=self.memory_efficient,
                num_batches_tracked=self._buffers.get("num_batches_tracked") if tracks else None,
                skipped_updates=self._buffers.get("_skipped_updates") if tracks else None,
            )
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def _peers(self) -> Peers | None:
        """Whom this forward shares its statistics with: nobody."""
        return None

    def extra_repr(self) -> str:
        """torch's, then what differs from torch's defaults."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )
        return text + shown(
            self, act=None, act_param=None, channel_dim=1, unbiased=True, correction=0,
            on_single_value="error", memory_efficient=False,
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalization of `(N, C)` or `(N, C, L)` (Ioffe & Szegedy 2015, arXiv:1502.03167).

        y = act((x - mean) / √(var + eps) * weight + bias + residual)

    Training normalizes with the mean and the biased variance of the batch, one pair a channel over
    N (and L), and moves the running statistics towards them; evaluation uses the running ones.
    State dicts load from and into `torch.nn.BatchNorm1d`.

    Args:
        num_features: C.
        eps: added to the variance, in units of x².
        momentum: the weight of the *new* batch in the running statistics (Keras and Flax state the
            old one's); None keeps the plain average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers; float32 serves half inputs too.
        bias: learn β; only with `affine`.
        act: an activation fused into the layer, see `normally.functional.batch_norm`.
        act_param: its parameter.
        channel_dim: the dimension of C: 1, or -1 for `(N, L, C)`.
        unbiased: `running_var` keeps the unbiased variance (torch) or the biased (Keras, Flax).
        correction: the variance that normalizes is divided by m - correction.
        on_single_value: "error" or "running" where training meets one value per channel.
        memory_efficient: keep recipes in place of outputs, see `normally.functional.batch_norm`.

    >>> layer = BatchNorm1d(2, act="relu")
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
    tensor([[0.0000, 0.0000],
            [1.0000, 1.0000]])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 2 and input.dim() != 3:
            raise dims_error("2D or 3D", input)


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalization of `(N, C, H, W)`: as `BatchNorm1d`, over N, H and W.

    channels_last inputs are normalized in their own layout and give channels_last outputs.

    >>> layer = BatchNorm2d(3, act="relu")
    >>> layer(torch.zeros(2, 3, 4, 4), residual=torch.ones(2, 3, 4, 4)).unique()
    tensor([1.], grad_fn=<Unique2Backward0>)
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise dims_error("4D", input)


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""Batch normalization of `(N, C, T, H, W)`: as `BatchNorm1d`, over N, T, H and W.

    >>> BatchNorm3d(2)(torch.rand(2, 2, 3, 4, 5)).shape
    torch.Size([2, 2, 3, 4, 5])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            raise dims_error("5D", input)

"""GroupNorm: torch's, with masks and an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from .._ops import activation
from ._location import located
from ._options import activation_of, shown
from ._tracing import traced


class GroupNorm(torch.nn.GroupNorm):
    r"""Group normalization (Wu & He 2018, arXiv:1803.08494).

        y = act((x - mean) / √(var + eps) * weight + bias)

    Mean and biased variance are those of each sample and each group of num_channels / num_groups
    neighbouring channels; the same in training and in evaluation. channels_last inputs are
    normalized in their own layout, as exactly. State dicts load from and into `torch.nn.GroupNorm`.

    Args:
        num_groups: divides `num_channels`.
        num_channels: C of the input `(N, C, *)`.
        eps: added to the variance, in units of x².
        affine: learn γ (`weight`) and β (`bias`), one a channel.
        device: of the parameters.
        dtype: of the parameters; float32 serves half inputs too.
        bias: learn β; only with `affine`.
        act: an activation fused into the layer, see `normally.functional.group_norm`; "silu" in
            diffusion models.
        act_param: its parameter.

    >>> layer = GroupNorm(2, 4, act="silu")
    >>> layer(torch.ones(1, 4, 3, 3)).unique().detach()
    tensor([0.])
    """

    act: str | None = None
    act_param: float | None = None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        act_param: float | None = None,
    ) -> None:
        if num_groups < 1:
            raise ValueError(
                f"{type(self).__name__}: num_groups must be 1 or more. Got num_groups={num_groups}."
            )
        activation.encode(act, act_param, type(self).__name__)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.act = act
        self.act_param = act_param

    def reset_parameters(self) -> None:
        """γ = 1 and β = 0 where the layer has them."""
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor:
        """act(gn(input)); see `normally.functional.group_norm`.

        `act` and `act_param` are the activation of this call, for a layer that has none.
        """
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(self, input, mask=mask, lengths=lengths, act=act, act_param=act_param)
        try:
            act, act_param = activation_of(self, act, act_param)
            return functional.group_norm(
                input, self.num_groups, self.weight, self.bias, self.eps,
                act=act, act_param=act_param, mask=mask, lengths=lengths,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def extra_repr(self) -> str:
        """torch's, then what differs from torch's defaults."""
        return super().extra_repr() + shown(self, act=None, act_param=None)

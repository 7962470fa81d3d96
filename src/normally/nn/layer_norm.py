"""LayerNorm: torch's, with masks, a residual, an activation and any one dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional
from .._ops import activation
from ._location import located
from ._options import activation_of, shown
from ._tracing import traced


class LayerNorm(torch.nn.LayerNorm):
    r"""Layer normalization (Ba et al. 2016, arXiv:1607.06450).

        y = act((x - mean) / √(var + eps) * weight + bias)

    Mean and biased variance are those of each sample alone, over the last dimensions or over `dim`;
    the same in training and in evaluation. State dicts load from and into `torch.nn.LayerNorm`.

    Args:
        normalized_shape: the sizes of the last dimensions, which are normalized together; with
            `dim`, the size of that one.
        eps: added to the variance, in units of x².
        elementwise_affine: learn γ (`weight`) and β (`bias`), of `normalized_shape`.
        bias: learn β; only with `elementwise_affine`.
        device: of the parameters.
        dtype: of the parameters; float32 serves half inputs too.
        act: an activation fused into the layer, see `normally.functional.layer_norm`.
        act_param: its parameter.
        dim: the one dimension to normalize over: 1 is channels first, without a copy.

    >>> layer = LayerNorm(2, act="relu")
    >>> layer(torch.tensor([[1.0, 3.0], [10.0, 30.0]])).detach()
    tensor([[0.0000, 1.0000],
            [0.0000, 1.0000]])
    """

    act: str | None = None
    act_param: float | None = None
    dim: int | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
        act_param: float | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        activation.encode(act, act_param, type(self).__name__)
        if dim is not None and len(self.normalized_shape) != 1:
            raise ValueError(
                f"{type(self).__name__}: normalized_shape must be one size where dim is given. "
                f"Got normalized_shape={self.normalized_shape}, dim={dim}."
            )
        self.act = act
        self.act_param = act_param
        self.dim = dim
        if act is not None or dim is not None:
            self.register_forward_pre_hook(_is_called)

    def forward(  # type: ignore[override]  # a residual gives two results
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        act: str | None = None,
        act_param: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The normalized input; with a residual that of input + residual, and that sum.

        `act` and `act_param` are the activation of this call, for a layer that has none.
        """
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(
                self, input, residual=residual, mask=mask, lengths=lengths, act=act,
                act_param=act_param,
            )  # fmt: skip
        shape, weight, bias, eps = self.normalized_shape, self.weight, self.bias, self.eps
        try:
            act, act_param = activation_of(self, act, act_param)
            if residual is None:
                return functional.layer_norm(
                    input, shape, weight, bias, eps,
                    act=act, act_param=act_param, dim=self.dim, mask=mask,
                    lengths=lengths,
                )  # fmt: skip
            return functional.add_layer_norm(
                input, residual, shape, weight, bias, eps,
                act=act, act_param=act_param, dim=self.dim, mask=mask, lengths=lengths,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def extra_repr(self) -> str:
        """torch's, then what differs from torch's defaults."""
        return super().extra_repr() + shown(self, act=None, act_param=None, dim=None)


def _is_called(layer: torch.nn.Module, args: tuple[object, ...]) -> None:
    """Nothing. torch's transformer layers take a norm's parameters and leave its call out.

    In evaluation their fast path would drop the activation without a word; a module with hooks is
    called.
    """

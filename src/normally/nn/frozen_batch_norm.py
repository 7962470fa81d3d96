"""FrozenBatchNorm: batch norm of any rank whose statistics and affine part are constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ._location import located
from ._tracing import traced


class FrozenBatchNorm(torch.nn.Module):
    r"""Batch normalization with fixed statistics and a fixed affine part, in every mode.

        y = (x - running_mean) / √(running_var + eps) * weight + bias

    All four are buffers: no optimizer sees them, and `.train()` changes nothing. One multiply-add a
    value, and the backward needs no x, so none is saved. It starts as the identity but for eps.

    State dicts load from `torch.nn.BatchNorm1d`, 2d and 3d (without γ and β: 1 and 0), from the
    frozen layers of torchvision, detectron2 and timm, and into all of these.

    Args:
        num_features: C of the input `(N, C, *)`.
        eps: added to the variance, in units of x².
        device: of the buffers.
        dtype: of the buffers; float32 serves half inputs too.

    >>> layer = FrozenBatchNorm(2)
    >>> _ = layer.load_state_dict(torch.nn.BatchNorm2d(2).state_dict())
    >>> layer(torch.ones(1, 2, 1, 1)).flatten(), len(list(layer.parameters()))
    (tensor([1.0000, 1.0000]), 0)
    """

    num_features: int
    eps: float
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, fill in _FILLS.items():
            value = torch.full((num_features,), fill, device=device, dtype=dtype)
            self.register_buffer(name, value)

    def forward(
        self, input: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> Tensor:
        """See `normally.functional.frozen_batch_norm`."""
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(self, input, mask=mask, lengths=lengths)
        try:
            return functional.frozen_batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, self.eps,
                mask=mask, lengths=lengths,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A batch norm's, too: its counter is not kept, and no γ or β is 1 and 0."""
        state_dict.pop(prefix + "num_batches_tracked", None)
        if prefix + "running_var" in state_dict:
            for name in ("weight", "bias"):
                if prefix + name not in state_dict:
                    state_dict[prefix + name] = torch.full_like(getattr(self, name), _FILLS[name])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """As torchvision's."""
        return f"{self.num_features}, eps={self.eps}"


_FILLS = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}

"""RMSNorm: torch's, with masks, a residual, and the casting orders of the language models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional
from ..functional.rms_norm import check_casting
from ._location import located
from ._options import shown
from ._tracing import traced


class RMSNorm(torch.nn.RMSNorm):
    r"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

        y = x / √(mean(x²) + eps) * weight

    The mean is that of each sample alone, over the last dimensions; the same in training and in
    evaluation. State dicts load from and into `torch.nn.RMSNorm`, Hugging Face's `LlamaRMSNorm`
    (`casting="llama"`) and `GemmaRMSNorm` (`casting="gemma", zero_centered_weight=True`).

    Args:
        normalized_shape: the sizes of the last dimensions, which are normalized together.
        eps: added to mean(x²), in units of x²; None means the machine epsilon of float32, and of
            float64 for a float64 input.
        elementwise_affine: learn the weight, of `normalized_shape`.
        device: of the weight.
        dtype: of the weight; float32 serves half inputs too.
        casting: "torch", "llama" or "gemma", see `normally.functional.rms_norm`.
        zero_centered_weight: multiply by 1 + weight; the weight starts at 0.

    >>> layer = RMSNorm(2, eps=1e-6)
    >>> layer(torch.tensor([[1.0, -1.0], [0.3, 0.3]])).detach()
    tensor([[ 1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    """

    casting: str = "torch"
    zero_centered_weight: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        casting: str = "torch",
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        check_casting(casting, type(self).__name__)
        self.casting = casting
        self.zero_centered_weight = zero_centered_weight
        if zero_centered_weight:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight that multiplies by 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(  # type: ignore[override]  # a residual gives two results
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The normalized input; with a residual that of input + residual, and that sum."""
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(self, input, residual=residual, mask=mask, lengths=lengths)
        shape, weight, eps = self.normalized_shape, self.weight, self.eps
        try:
            if residual is None:
                return functional.rms_norm(
                    input, shape, weight, eps, casting=self.casting,
                    zero_centered_weight=self.zero_centered_weight, mask=mask, lengths=lengths,
                )  # fmt: skip
            return functional.add_rms_norm(
                input, residual, shape, weight, eps, casting=self.casting,
                zero_centered_weight=self.zero_centered_weight, mask=mask, lengths=lengths,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

    def extra_repr(self) -> str:
        """torch's, then what differs from torch's defaults."""
        return super().extra_repr() + shown(self, casting="torch", zero_centered_weight=False)

"""LocalResponseNorm: torch's, in one pass and with masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._location import located
from ._tracing import traced


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    r"""Local response normalization (Krizhevsky et al. 2012, "ImageNet classification", 3.3).

        y = x / (k + alpha / size * Σ x²)^beta

    The sum of a channel is over itself and its neighbours, `size` channels where they exist. alpha
    is divided by `size`: torch's convention.

    Args:
        size: how many channels a sum is over.
        alpha: in units of 1/x² if k is a number.
        beta: the exponent.
        k: what is added to the sum.

    >>> layer = LocalResponseNorm(2, alpha=2.0, beta=0.5, k=0.0)
    >>> layer(torch.tensor([[[3.0], [4.0]]])).flatten()
    tensor([1.0000, 0.8000])
    """

    def forward(
        self, input: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> Tensor:
        """See `normally.functional.local_response_norm`."""
        if isinstance(input, torch.fx.Proxy):  # symbolic tracing: one node, as for torch's layers
            return traced(self, input, mask=mask, lengths=lengths)
        try:
            return functional.local_response_norm(
                input, self.size, self.alpha, self.beta, self.k, mask=mask, lengths=lengths
            )
        except (ValueError, TypeError) as error:
            raise located(error, self) from None

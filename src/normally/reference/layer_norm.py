"""Layer normalization as its formula."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .normalization import hide, moments, normalize, transform, widen


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | None = None,
    act: str | None = None,
    act_param: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450): formula 6.

        y = act(weight * (x - mean) / √(var + eps) + bias)

    Mean and biased variance of each sample over the last `len(normalized_shape)` dimensions, or
    over `dim` alone; the same in training and in evaluation.

    Args:
        input: `(*, *normalized_shape)`, or `normalized_shape` is the size of `dim`.
        normalized_shape: what is normalized together.
        weight: γ, of `normalized_shape`; None is 1.
        bias: β, likewise; None is 0.
        eps: in units of x².
        dim: the one dimension to normalize over, wherever it is.
        act: a name of `ACTIVATIONS`.
        act_param: leaky_relu's slope, elu's alpha.
        mask: bool, broadcastable to `input`; False enters no statistic and gives 0.

    >>> import torch
    >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
    tensor([[-1.,  1.]])
    """
    x = hide(widen(input), mask)
    dims, shape = normalized_dims(x, normalized_shape, dim)
    mean, var = moments(x, dims, mask)
    y = normalize(x, mean, var, eps)
    return transform(y, weight, bias, shape, act, act_param, mask=mask).to(input.dtype)


def normalized_dims(
    x: Tensor, normalized_shape: Sequence[int], dim: int | None
) -> tuple[list[int], list[int]]:
    """The dimensions that are normalized together, and the parameters' shape beside `x`."""
    if dim is None:
        return list(range(x.dim() - len(normalized_shape), x.dim())), list(normalized_shape)
    dim %= x.dim()
    return [dim], [-1 if d == dim else 1 for d in range(x.dim())]

"""`mask=` and `lengths=`: which positions count, in the form that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import different_devices, is_tracing


def prepare_mask(
    input: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    channel_dim: int,
    caller: str,
) -> Tensor | None:
    """The mask as the operators take it; None without mask and lengths.

    Args:
        input: any shape that has a dimension `channel_dim`.
        mask: bool, True where a position counts: without the channel dimension and broadcastable
            to the others, or with as many dimensions as `input` and 1 in place of the channel.
        lengths: `(N,)` integers: of sample n the positions below lengths[n] count, along the one
            dimension that is neither 0 nor the channel's.
        channel_dim: the dimension that shares a mask.
        caller: whom the errors name.

    Returns:
        bool, of the input's shape but for the 1 in place of the channel.

    Raises:
        ValueError: for both, for shapes that do not fit, and for lengths where there is not exactly
            one dimension that they could mean.
        TypeError: for a mask that is not bool or lengths that are not integers.

    >>> prepare_mask(torch.zeros(2, 3, 4), None, torch.tensor([4, 1]), 1, "example")
    tensor([[[ True,  True,  True,  True]],
    <BLANKLINE>
            [[ True, False, False, False]]])
    """
    if mask is None and lengths is None:
        return None
    channel_dim %= input.dim()
    if mask is None:
        assert lengths is not None  # for mypy
        return _mask_of_lengths(input, lengths, channel_dim, caller)
    if lengths is not None:
        raise ValueError(
            f"{caller}: mask and lengths cannot be given together: each says which positions count."
        )
    if mask.dtype is not torch.bool:
        raise TypeError(
            f"{caller}: mask must be torch.bool, True where a position counts. "
            f"Got mask.dtype={mask.dtype}; convert it with mask.bool()."
        )
    if mask.device != input.device:
        raise different_devices("mask", mask, input, caller)
    given, dims = mask, input.dim()
    if mask.dim() < dims:
        mask = mask[(None,) * (dims - 1 - mask.dim())].unsqueeze(channel_dim)
    shape = list(input.shape)
    shape[channel_dim] = 1
    if not is_tracing() and (
        mask.dim() != dims
        # Written with !=, which compilers know of symbolic sizes; `in` they do not.
        or any(m != 1 and m != n for m, n in zip(mask.shape, shape, strict=True))
    ):
        raise _other_shape(given, input, channel_dim, caller)
    return mask.expand(shape)


def _other_shape(mask: Tensor, input: Tensor, channel_dim: int, caller: str) -> ValueError:
    shape = tuple(input.shape)
    before, after = shape[:channel_dim], shape[channel_dim + 1 :]
    return ValueError(
        f"{caller}: mask must be broadcastable to {before + after}, the input without its channel, "
        f"or to {(*before, 1, *after)}. Got mask of shape {tuple(mask.shape)}, "
        f"input of shape {shape} with the channel at dim {channel_dim}."
    )


def _mask_of_lengths(input: Tensor, lengths: Tensor, channel_dim: int, caller: str) -> Tensor:
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        raise TypeError(f"{caller}: lengths must be integers. Got lengths.dtype={dtype}.")
    if lengths.device != input.device:
        raise different_devices("lengths", lengths, input, caller)
    others = [d for d in range(1, input.dim()) if d != channel_dim]
    if len(others) != 1 or channel_dim == 0:
        raise ValueError(
            f"{caller}: lengths needs exactly one dimension beside the batch (dim 0) and the "
            f"channel (dim {channel_dim}). Got input of shape {tuple(input.shape)}; pass mask= "
            "instead."
        )
    if not is_tracing() and (lengths.dim() != 1 or lengths.shape[0] != input.shape[0]):
        raise ValueError(
            f"{caller}: lengths must be one number a sample, of shape ({input.shape[0]},). "
            f"Got lengths of shape {tuple(lengths.shape)}, input of shape {tuple(input.shape)}."
        )
    position = torch.arange(input.shape[others[0]], device=lengths.device)
    return (position < lengths.unsqueeze(-1)).unsqueeze(channel_dim)


def rows_of_mask(mask: Tensor | None, start_dim: int) -> Tensor | None:
    """The mask of whole rows, 1 in place of every dimension from `start_dim` on.

    None if the mask may differ inside a row. That is read off its strides, for its values may not
    be known yet; a tracer must not be asked.
    """
    assert mask is not None
    if is_tracing():
        return None
    for d in range(start_dim, mask.dim()):
        if mask.shape[d] != 1 and mask.stride(d) != 0:
            return None
        mask = mask.narrow(d, 0, 1)
    return mask


def in_layout_of(output: Tensor, input: Tensor) -> Tensor:
    """A formula's output with the strides that an operator's has: those of a dense input."""
    if is_tracing() or torch._C._are_functorch_transforms_active():
        return output  # strides have no meaning there
    if output.stride() == input.stride():
        return output
    return torch.empty_like(input, dtype=output.dtype).copy_(output)

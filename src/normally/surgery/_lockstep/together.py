"""The micro-batches' calls of one batch norm as one call, and its output as theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional._checks import prepare_residual
from ...functional._masks import prepare_mask
from ...nn.batch_norm import _BatchNorm as OurBatchNorm


class Joined(NamedTuple):
    """One call for all, and what its output is taken apart by."""

    arguments: dict[str, Any]
    shapes: list[torch.Size]
    channel_dim: int
    #: Whether the positions of all are in one row, as their sizes differ in more than the batch.
    is_flat: bool


def together(
    layer: torch.nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], path: str
) -> Joined:
    """The arguments of all `calls` of `layer.forward` as those of one call."""
    ours = isinstance(layer, OurBatchNorm)
    given = [_bind(ours, path, *args, **kwargs) for args, kwargs in calls]
    inputs = [g["input"] for g in given]
    first = inputs[0]
    channel_dim = layer.channel_dim if isinstance(layer, OurBatchNorm) else 1
    dims = first.dim()
    # What has no channel is the layer's to refuse.
    channel = channel_dim % dims if -dims <= channel_dim < dims else 0
    for x in inputs:
        if (x.dim(), x.dtype, x.device) != (dims, first.dtype, first.device) or (
            dims and x.shape[channel] != first.shape[channel]
        ):
            raise ValueError(
                f"accumulate: the micro-batches' inputs of {path} must have the same dimensions, "
                "channels, dtype and device. Got "
                + ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in inputs)
                + "."
            )
    is_flat = dims > 0 and any(x.shape[1:] != first.shape[1:] for x in inputs)
    arguments = {"input": inputs}
    if any(g["residual"] is not None for g in given):
        residuals = [g["residual"] for g in given]
        if any(r is None for r in residuals):
            raise ValueError(
                f"accumulate: all micro-batches of {path} must have a residual, or none."
            )
        arguments["residual"] = [
            prepare_residual(r, x, "accumulate") for r, x in zip(residuals, inputs, strict=True)
        ]
    if any(g["mask"] is not None or g["lengths"] is not None for g in given):
        arguments["mask"] = [_mask(g, x, channel_dim) for g, x in zip(given, inputs, strict=True)]
    joined = {
        name: _flat(tensors, channel, channel_dim) if is_flat else torch.cat(tensors)
        for name, tensors in arguments.items()
    }
    return Joined(joined, [x.shape for x in inputs], channel, is_flat)


def apart(output: Any, joined: Joined, path: str) -> list[Tensor]:
    """The output of the call as those of the micro-batches.

    Copies, for parts of one tensor could not be changed in place one by one: ReLU(inplace=True).
    """
    x, shapes, channel = joined.arguments["input"], joined.shapes, joined.channel_dim
    if not isinstance(output, Tensor) or output.shape != x.shape:
        raise TypeError(
            f"accumulate: with exact=True the output of {path} must be a tensor of its input's "
            f"shape {tuple(x.shape)}. Got {getattr(output, 'shape', type(output).__name__)}."
        )
    if not joined.is_flat:
        return [part.clone() for part in output.split([shape[0] for shape in shapes])]
    channels = x.shape[channel]
    rows = output.movedim(channel, -1).reshape(-1, channels)
    others = [[*shape[:channel], *shape[channel + 1 :]] for shape in shapes]
    parts = rows.split([rest.numel() for rest in map(torch.Size, others)])
    return [
        part.clone().view(*rest, channels).movedim(-1, channel)
        for part, rest in zip(parts, others, strict=True)
    ]


def _bind(ours: bool, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    names = ("input", "residual", "mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    allowed = {*names, "lengths"} if ours else {"input"}
    if (
        len(args) > len(names)
        or not set(given) <= allowed
        or not isinstance(given.get("input"), Tensor)
    ):
        raise TypeError(
            f"accumulate: with exact=True {path} must be called with {', '.join(sorted(allowed))}. "
            f"Got {len(args)} positional arguments and {sorted(kwargs)}."
        )
    return {name: given.get(name) for name in (*names, "lengths")}


def _mask(given: dict[str, Any], input: Tensor, channel_dim: int) -> Tensor:
    shape = list(input.shape)
    shape[channel_dim] = 1
    mask = prepare_mask(input, given["mask"], given["lengths"], channel_dim, "accumulate")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=input.device)
    return mask.expand(shape)


def _flat(tensors: list[Tensor], channel: int, channel_dim: int) -> Tensor:
    """All positions of all tensors in one sample, in as many dimensions as they have."""
    rows = torch.cat([t.movedim(channel, -1).reshape(-1, t.shape[channel]) for t in tensors])
    sample = rows.movedim(-1, 0)  # (C, M)
    ones = (1,) * (tensors[0].dim() - 3)
    if channel_dim == -1:
        return rows.view(1, *ones, *rows.shape)
    return sample.unsqueeze(0).view(1, *sample.shape, *ones)

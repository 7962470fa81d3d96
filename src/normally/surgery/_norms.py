"""What a normalization layer is, for verbs that do not ask what it computes."""

from __future__ import annotations

import torch

from ._counterparts import COUNTERPARTS, OURS
from ._foreign import Converted, ConvertedBatchNorm

_CONVERTED = (Converted, ConvertedBatchNorm)


def is_ours(module: torch.nn.Module) -> bool:
    """Whether it computes with our functions: made as one of our layers, or converted."""
    return isinstance(module, (*OURS, *_CONVERTED))


def looks_like_a_norm(module: torch.nn.Module) -> bool:
    """Whether it is a normalization layer by its class, or by its name and a weight.

    So hundreds of classes of other libraries need no list, and nothing has to be computed.
    """
    if is_ours(module) or isinstance(module, tuple(COUNTERPARTS)):
        return True
    if "norm" not in type(module).__name__.lower():
        return False
    return "weight" in {*module._parameters, *module._buffers}


def keeps_statistics(module: torch.nn.Module) -> bool:
    """Whether it has running statistics."""
    buffers = module._buffers
    return buffers.get("running_mean") is not None and buffers.get("running_var") is not None


def is_constant(module: torch.nn.Module) -> bool:
    """Whether it was made as a frozen batch norm: what others learn is in its buffers."""
    return keeps_statistics(module) and module._buffers.get("weight") is not None

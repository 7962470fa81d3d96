"""What batch norm refuses, and in which words."""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import Peers
from ._checks import ArgumentError, check_input, check_of_channels


class Call(NamedTuple):
    """One call of batch norm, the channel at dimension 1."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    skipped_updates: Tensor | None
    training: bool
    momentum: float | None
    unbiased: bool
    eps: float
    correction: int
    on_single_value: str
    act: int
    act_param: float
    memory_efficient: bool


def checked(call: Call, *, alone: bool = True) -> Call:
    """Refuse what makes no sense before anything is changed.

    How many values there are is asked only where the call is normalized `alone`, and not together
    with those of other processes.
    """
    x, training, eps = call.input, call.training, call.eps
    if call.on_single_value not in ("error", "running"):
        raise ValueError(
            "batch_norm: on_single_value must be 'error' or 'running'. "
            f"Got on_single_value={call.on_single_value!r}."
        )
    if call.correction < 0:
        raise ValueError(
            f"batch_norm: correction must be 0 or more. Got correction={call.correction}."
        )
    check_input(x, "batch_norm")
    if x.dim() < 2 and not (x.dim() == 1 and x.numel() == 0):
        raise ValueError(
            f"batch_norm: input must have at least 2 dimensions (N, C, *). Got {x.dim()}D input."
        )
    if not training:
        for name in ("running_mean", "running_var"):
            if getattr(call, name) is None:
                raise ArgumentError(
                    f"batch_norm: {name} must be defined in evaluation mode. Got {name}=None; "
                    "pass training=True to normalize with the batch's own statistics."
                )
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if x.dim() < 2:
        return call
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(call, name)
        if tensor is not None:
            check_of_channels(name, tensor, x, "batch_norm")
    if not training:
        return call
    if call.momentum is None and call.num_batches_tracked is None and call.running_mean is not None:
        raise ValueError(
            "batch_norm: num_batches_tracked must be given when momentum is None: the cumulative "
            "average divides by the number of batches. Got momentum=None, num_batches_tracked=None."
        )
    if not alone:
        return call
    if call.mask is None:
        count = math.prod(x.shape[:1] + x.shape[2:])
    elif (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or call.mask.is_cuda
    ):
        # How many are kept is known only when it runs: the CPU's kernel asks then. A GPU's answer
        # would have to be waited for; one value comes out as the bias there.
        return call
    else:
        count = int(call.mask.expand(x[:, :1].shape).sum())
    if count > max(1, call.correction) or count == 0:
        return call
    if call.on_single_value == "running" and None not in (call.running_mean, call.running_var):
        return call._replace(training=False)
    return _refuse_single_value(x, count, call.correction)


def is_other_dim(channel_dim: int, input: Tensor) -> bool:
    """Whether `channel_dim`, which is not 1, names another dimension than 1."""
    dims = input.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"batch_norm: channel_dim must be a dimension of the input, {-dims} to {dims - 1}. "
            f"Got channel_dim={channel_dim}, input of shape {tuple(input.shape)}."
        )
    return channel_dim % dims != 1


def _refuse_single_value(input: Tensor, count: int, correction: int) -> NoReturn:
    way_out = (
        "Use a larger batch, drop_last=True in the DataLoader, .eval(), or "
        "on_single_value='running' with running statistics."
    )
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{input.size()}: its mean is the value itself, so every output would be the bias. "
            f"{way_out}"
        )
    raise ValueError(
        f"batch_norm: expected more than correction={correction} values per channel when training, "
        f"got {count} with input size {input.size()}. {way_out}"
    )


def peers_of(group: object) -> Peers | None:
    """The processes of `group=`, and None where there is but this one."""
    if isinstance(group, Peers):
        peers = group
    elif isinstance(group, dist.ProcessGroup):
        peers = Peers(group, "batch_norm")
    else:
        raise TypeError(
            "batch_norm: group must be a torch.distributed.ProcessGroup or None. "
            f"Got group of type {type(group).__name__}; the group of all processes is "
            "torch.distributed.group.WORLD after torch.distributed.init_process_group."
        )
    return peers if peers.group.size() > 1 else None

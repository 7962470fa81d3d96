"""SyncBatchNorm: batch norm whose statistics are those of all processes of a group together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase

from ..distributed import Peers
from ._location import dims_error, path_of
from ._sync_conversion import check_group, convert
from .batch_norm import _BatchNorm
from .lazy_batch_norm import _LazyBatchNorm


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalization of `(N, C, *)` over the batches of all processes of a group.

        y = act((x - mean) / √(var + eps) * weight + bias + residual)

    In training `mean` and `var` are those of all values of the group's processes, each value with
    the same weight: N processes give what one gives for the concatenated batch, outputs, gradients
    and running statistics. Batches may have other sizes on every process, and be empty. Each
    forward and each backward of a training step is one collective; evaluation is none.

    Without an initialized process group, and in a group of one, it is plain batch norm. It works on
    CPU tensors (gloo) as on CUDA tensors (NCCL). State dicts load from and into every batch norm of
    torch and of this package. It is no subclass of `torch.nn.SyncBatchNorm`, which
    DistributedDataParallel refuses on a CPU.

    Args:
        num_features: C.
        eps: added to the variance, in units of x².
        momentum: the weight of the *new* batch in the running statistics; None keeps the plain
            average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics; without them evaluation uses the statistics of
            the process's own batch.
        process_group: the processes that share statistics; None is the default group of
            `torch.distributed` when there is one.
        device: of parameters and buffers.
        dtype: of parameters and buffers; float32 serves half inputs too.
        bias: learn β; only with `affine`.
        act: an activation fused into the layer, see `normally.functional.batch_norm`.
        act_param: its parameter.
        channel_dim: the dimension of C: 1, or -1 for channels-last shapes.
        unbiased: `running_var` keeps the unbiased variance (torch) or the biased (Keras, Flax).
        correction: the variance that normalizes is divided by m - correction.
        on_single_value: "error" or "running" where training meets one value per channel.
        memory_efficient: keep recipes in place of outputs, see `normally.functional.batch_norm`;
            nothing is exchanged again for them.

    >>> layer = SyncBatchNorm(2, act="relu")  # one process: plain batch norm
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
    tensor([[0.0000, 0.0000],
            [1.0000, 1.0000]])
    """

    process_group: Any
    #: Where the layer was in the model when it first met others: what all of them call it.
    _path: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        act_param: float | None = None,
        channel_dim: int = 1,
        unbiased: bool = True,
        correction: int = 0,
        on_single_value: str = "error",
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, act=act, act_param=act_param, channel_dim=channel_dim, unbiased=unbiased,
            correction=correction, on_single_value=on_single_value,
            memory_efficient=memory_efficient,
        )  # fmt: skip
        check_group(process_group, "process_group", type(self).__name__)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise dims_error("at least 2D", input)

    def _peers(self) -> Peers | None:
        """Whom this forward shares its statistics with; None is nobody."""
        if not self.training or not torch.distributed.is_available():
            return None
        group = self.process_group
        if group is None:
            if not torch.distributed.is_initialized():
                return None
            group = torch.distributed.group.WORLD
        kind = type(self).__name__
        if torch.compiler.is_compiling():
            return Peers(group, kind)
        if self._path is None:  # a search: once
            self._path = path_of(self) or ""
        return Peers(group, f"{kind} at {self._path}" if self._path else kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in the same process group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return other

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None
    ) -> torch.nn.Module:
        """`normally.convert_sync_batchnorm`, where torch has it."""
        return convert(module, process_group, cls, _LazySyncBatchNorm)


class _LazySyncBatchNorm(_LazyBatchNorm, _LazyNormBase, SyncBatchNorm):
    """What a lazy batch norm is converted to: it becomes a `SyncBatchNorm` at its first input."""

    cls_to_become = SyncBatchNorm

"""oneDNN through torch's MKL-DNN tensors: of the norms, batch norm of 4-d tensors.

torch 2.13 dispatches `native_batch_norm` and its backward to oneDNN for such tensors, in training
for 4-d ones only; its layer, group, instance and RMS norm refuse them, and so do the activations
other than ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import measure
from .contender import Contender
from .operator import Case, Operator


class OneDNNBlock(nn.Module):
    """torch's composition on MKL-DNN tensors, from dense to dense."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        """The reorders at both ends are no part of a step."""
        return cast(Tensor, self.block(*(x.to_mkldnn() for x in inputs)).to_dense())


class OneDNN(Contender):
    """torch.nn.BatchNorm2d, sum and ReLU on tensors in oneDNN's format, made beforehand."""

    name = "oneDNN"

    def describe(self) -> str:
        """The version that torch was built with; its threads are torch's."""
        if not torch.backends.mkldnn.is_available():
            raise ValueError("bench: also must name what is there. This torch has no oneDNN.")
        found = re.search(r"(?:MKL-?DNN|oneDNN) v([\d.]+)", torch.__config__.show())
        return f"oneDNN {found[1] if found else 'of unknown version'} in torch, torch's threads"

    def has(self, operator: Operator, case: Case) -> bool:
        """Training of contiguous 4-d batch norm; a channels_last tensor would be reordered."""
        return (
            operator.name == "batch_norm"
            and len(case.shape.size) == 4
            and case.layout == "contiguous"
            and case.dtype in ("float32", "bfloat16")
            and case.act in (None, "relu")
            and case.fused
            and case.mode != "evaluation"
        )

    def build(self, operator: Operator, case: Case) -> nn.Module:
        """The modules of torch."""
        return OneDNNBlock(operator.theirs(case))

    def make_step(
        self, module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
    ) -> measure.Step:
        """As torch's, on tensors in oneDNN's format."""
        block = cast(OneDNNBlock, module).block
        own = [x.detach().to_mkldnn().requires_grad_() for x in inputs]
        return measure.make_step(block, own, mode, [grad.to_mkldnn() for grad in grads])

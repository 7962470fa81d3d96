"""Liger-Kernel (arXiv:2410.10989): the norms of language models in Triton."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..operator import Case, Operator
from ..torch_block import compose
from .library import Library, eps_of

_LAYERS = "liger_kernel.transformers"


class Liger(Library):
    """Its RMS norm, add and RMS norm, layer norm and, with torch's SiLU, group norm."""

    name = "Liger"
    package = "liger-kernel"
    modules = (_LAYERS,)

    def has(self, operator: Operator, case: Case) -> bool:
        """It walks contiguous tensors; its batch norm keeps no running statistics."""
        known = ("rms_norm", "add_rms_norm", "layer_norm", "group_norm")
        return operator.name in known and case.layout == "contiguous"

    def build(self, operator: Operator, case: Case) -> nn.Module:
        """A layer with γ = 1 and β = 0, which writes nothing in place."""
        eps, last = eps_of(operator, case), case.shape.size[-1]
        if operator.name == "rms_norm":
            layer = self.get(f"{_LAYERS}.rms_norm:LigerRMSNorm")(last, eps=eps, in_place=False)
        elif operator.name == "add_rms_norm":
            kind = self.get(f"{_LAYERS}.fused_add_rms_norm:LigerFusedAddRMSNorm")
            layer = kind(last, eps=eps, in_place=False)
        elif operator.name == "layer_norm":
            layer = self.get(f"{_LAYERS}.layer_norm:LigerLayerNorm")(last, eps=eps)
            return cast(nn.Module, layer.to(case.parameter_dtype))
        else:
            kind = self.get(f"{_LAYERS}.group_norm:LigerGroupNorm")
            layer = kind(case.shape.size[1], case.shape.options["num_groups"], eps=eps)
            return compose(layer.to(case.parameter_dtype), case)
        return cast(nn.Module, layer.to(case.torch_dtype))

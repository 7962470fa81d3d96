"""NVIDIA's apex: layer and RMS norm, and group norm with SiLU of channels_last images, in CUDA."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..operator import Case, Operator
from .library import Library, eps_of

_NORMS = "apex.normalization.fused_layer_norm"


class Apex(Library):
    """Where its extensions were compiled; its batch norm takes float16 alone."""

    name = "apex"
    package = "apex"
    modules = ("apex", _NORMS, "fused_layer_norm_cuda")

    def has(self, operator: Operator, case: Case) -> bool:
        """Group norm is in channels_last alone."""
        if operator.name == "group_norm":
            return case.layout == "channels_last" and self._has_group_norm()
        return operator.name in ("layer_norm", "rms_norm")

    def build(self, operator: Operator, case: Case) -> nn.Module:
        """A layer with γ = 1 and β = 0."""
        eps, last = eps_of(operator, case), case.shape.size[-1]
        if operator.name != "group_norm":
            name = "FusedRMSNorm" if operator.name == "rms_norm" else "FusedLayerNorm"
            layer = self.get(f"{_NORMS}:{name}")(last, eps=eps)
            return cast(nn.Module, layer.to(case.torch_dtype))  # it takes no other parameters
        kind = self.get("apex.contrib.group_norm:GroupNorm")
        groups, channels = case.shape.options["num_groups"], case.shape.size[1]
        layer = kind(groups, channels, eps=eps, dtype=case.parameter_dtype, act=case.act or "")
        return cast(nn.Module, layer)

    def _has_group_norm(self) -> bool:
        try:
            self.get("apex.contrib.group_norm:GroupNorm")
        except Exception:  # an extension of its own, compiled on request
            return False
        return True

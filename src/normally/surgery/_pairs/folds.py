"""Norms with running statistics whose input comes from a convolution or a linear layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _NormBase

from ... import nn
from .. import _foreign
from .._dataflow.flow import Flow, Op, Root, takers
from .._dataflow.hooks import has_hooks
from .fusions import Refusal, common


class Fold(NamedTuple):
    """A norm node of a graph in evaluation, and the layer that can absorb it."""

    root: Root
    path: str
    module: torch.nn.Module
    #: The convolution or linear layer, and its path.
    weights: torch.nn.Module
    weights_path: str
    #: The module in whose forward both are, by path in the model.
    owner: str


def find(flow: Flow) -> Iterator[Fold | Refusal]:
    """What can be folded, and why other norms with running statistics cannot."""
    holders = _holders(flow)
    for root in flow.roots:
        for node in root.traces[False].graph.nodes:
            op = root.op(node) if node.op == "call_module" else Op("other")
            if op.kind != "norm" or op.module is None or not has_statistics(op.module):
                continue
            found = _before(root, node, op, flow, holders)
            yield Refusal(op.path, op.module, found) if isinstance(found, str) else found


def has_statistics(norm: torch.nn.Module) -> bool:
    """Whether it is a batch norm, or another norm with running statistics."""
    if isinstance(norm, _foreign.Converted):
        return norm._recipe.kind == "frozen"
    is_one = isinstance(norm, (_NormBase, nn.FrozenBatchNorm))
    is_instance = isinstance(norm, torch.nn.modules.instancenorm._InstanceNorm)
    return is_one and (not is_instance or norm._buffers.get("running_mean") is not None)


def _before(
    root: Root,
    norm: torch.fx.Node,
    op: Op,
    flow: Flow,
    holders: dict[torch.nn.Parameter, int],
) -> Fold | str:
    """The fold of a norm, or why there is none."""
    assert op.module is not None  # for mypy
    if norm.kwargs.keys() & {"mask", "lengths"} or len(norm.args) > 2:
        return "its padding is masked"
    if op.module._buffers.get("running_mean") is None:
        return "it normalizes with the batch's own statistics in evaluation, too"
    node: Any = norm.args[0] if norm.args else norm.kwargs["input"]
    while root.op(node).kind in ("view", "dropout"):
        if len(takers(node)) != 1:
            return "its input is used elsewhere as well"
        node = node.all_input_nodes[0]
    source = root.op(node)
    if source.kind != "weights" or source.module is None:
        return "its input is no convolution's or linear layer's output"
    if len(takers(node)) != 1:
        return f"the output of {source.path} is used elsewhere as well"
    for module, path in ((op.module, "it"), (source.module, source.path)):
        reason = _why_not(module, flow)
        if reason is not None:
            return f"{path} {reason}"
    if any(holders.get(p, 0) > 1 for p in source.module.parameters(recurse=False)):
        return f"the parameters of {source.path} are another module's, too"
    owner = common([root.scope(norm), root.scope(node)])
    return Fold(root, op.path, op.module, source.module, source.path, owner)


def _why_not(module: torch.nn.Module, flow: Flow) -> str | None:
    if flow.sites.get(module, 0) > 1:
        return f"is used {flow.sites[module]} times in the forward"
    if flow.is_called_elsewhere(module):
        return "is called as well where the data flow cannot be followed"
    if has_hooks(module):
        return "has hooks, which would see other values"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "is parametrized: its weight is computed from others"
    if "forward" in module.__dict__:
        return "has a forward that was replaced"
    return None


def _holders(flow: Flow) -> dict[torch.nn.Parameter, int]:
    """By parameter: how many modules have it."""
    found: dict[torch.nn.Parameter, int] = {}
    for module in {m for root in flow.roots for m in root.module.modules()}:
        for parameter in module.parameters(recurse=False):
            found[parameter] = found.get(parameter, 0) + 1
    return found

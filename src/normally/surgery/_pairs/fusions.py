"""Norms whose activation, or addition and activation, can be one kernel with them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ... import nn
from .. import _foreign
from .._dataflow.activations import Activation
from .._dataflow.flow import Flow, Op, Root
from .._dataflow.hooks import has_hooks
from .._report import Change

_BATCH = torch.nn.modules.batchnorm._BatchNorm


class Fusion(NamedTuple):
    """A norm node of a graph, and what follows it."""

    root: Root
    norm: torch.fx.Node
    path: str
    #: The addition, and what is added; None without one.
    add: torch.fx.Node | None
    residual: torch.fx.Node | None
    #: The activation; None after an addition that nothing follows.
    act: torch.fx.Node | None
    activation: Activation | None
    #: The module that is the activation, and its path; None where it is a function.
    act_module: torch.nn.Module | None
    act_path: str
    #: How often that module stands in the data flow.
    act_sites: int
    #: The module in whose forward all of it is, by path in the model.
    owner: str

    @property
    def module(self) -> torch.nn.Module:
        """The norm."""
        return self.root.module.get_submodule(str(self.norm.target))

    def is_like(self, other: Fusion) -> bool:
        """Whether it is the same in the graph of the other mode."""
        mine, others = ((str(f), f.owner, f.act_path) for f in (self, other))
        return mine == others

    def __str__(self) -> str:
        """For a report."""
        parts = ["+"] if self.add is not None else []
        parts += [str(self.activation)] if self.activation is not None else []
        return " ".join(parts)


class Refusal(NamedTuple):
    """A norm that comes near to what is looked for, and why it is left."""

    path: str
    module: torch.nn.Module
    reason: str

    def line(self) -> Change:
        """For a report."""
        return Change(self.path, type(self.module).__name__, False, self.reason)


def find(flow: Flow, training: bool) -> Iterator[Fusion | Refusal]:
    """All fusions of a model in one mode, and what comes near to one."""
    for root in flow.roots:
        yield from in_graph(root, root.traces[training].graph, flow)


def in_graph(
    root: Root, graph: torch.fx.Graph, flow: Flow | None = None
) -> Iterator[Fusion | Refusal]:
    """All fusions of a graph of the root; without a flow nothing is asked of other places."""
    taken: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        op = root.op(node)
        if op.kind != "norm" or op.module is None or own_activation(op.module):
            continue
        found = _after(root, node, op, flow)
        if found is None or taken & {found.add, found.act} - {None}:
            continue
        reason = _why_not(found, flow)
        if reason is not None:
            yield Refusal(op.path, op.module, reason)
            continue
        taken |= {n for n in (found.add, found.act) if n is not None}
        yield found


def own_activation(norm: torch.nn.Module) -> bool:
    recipe = getattr(norm, "_recipe", None)
    if isinstance(recipe, _foreign.Recipe):
        return recipe.act is not None or type(norm._modules.get("act")) not in (
            type(None), torch.nn.Identity,
        )  # fmt: skip
    return isinstance(getattr(norm, "act", None), str)


def _after(root: Root, norm: torch.fx.Node, op: Op, flow: Flow | None) -> Fusion | None:
    """What follows a norm: an activation, or an addition and perhaps an activation."""
    if norm.kwargs or len(norm.args) != 1:
        return None  # its own forward was called with a residual, a mask or an activation
    node, through_view = _next(root, norm)
    add = residual = None
    if node is not None and root.op(node).kind == "add" and not through_view:
        others = [arg for arg in node.all_input_nodes if arg is not norm]
        operands = (*node.args, *node.kwargs.values())
        if len(operands) != 2 or len(others) != 1 or not takes_residual(op.module):
            return None
        add, residual = node, others[0]
        node = _next(root, add)[0] if len(add.users) == 1 else None
        if node is not None and _next_is_far(root, add, node):
            node = None
    if node is None or root.op(node).kind != "act":
        node = None
    if node is None and add is None:
        return None
    act = root.op(node) if node is not None else Op("other")
    nodes = [n for n in (norm, add, node) if n is not None]
    owner = common([root.scope(n) for n in nodes])
    sites = flow.sites.get(act.module, 0) if flow is not None and act.module is not None else 0
    return Fusion(
        root, norm, op.path, add, residual, node, act.activation, act.module, act.path, sites, owner
    )


def _next(root: Root, node: torch.fx.Node) -> tuple[torch.fx.Node | None, bool]:
    """The only one that takes the node's value, views left out; whether there were any."""
    through = False
    while len(node.users) == 1:
        (user,) = node.users
        if root.op(user).kind != "view" or user.op == "output":
            return (user, through) if user.op != "output" else (None, through)
        node, through = user, True
    return None, through


def _next_is_far(root: Root, add: torch.fx.Node, act: torch.fx.Node) -> bool:
    """Whether there are views between a sum and its activation."""
    return act not in add.users


def takes_residual(norm: torch.nn.Module | None) -> bool:
    """Whether the layer, or what it is converted to, adds a residual."""
    return isinstance(norm, (_BATCH, _foreign.ConvertedBatchNorm))


def takes_activation(norm: torch.nn.Module) -> bool:
    """Whether the layer, or what it is converted to, has activations."""
    if isinstance(norm, _foreign.Converted):
        return norm._recipe.kind != "rms"
    has_none = (nn.FrozenBatchNorm, torch.nn.RMSNorm, torch.nn.LocalResponseNorm)
    return not isinstance(norm, has_none)


def common(scopes: list[str]) -> str:
    """The innermost module that all of these are in."""
    first, *others = [scope.split(".") if scope else [] for scope in scopes]
    while not all(other[: len(first)] == first for other in others):
        first.pop()
    return ".".join(first)


def _why_not(found: Fusion, flow: Flow | None) -> str | None:
    norm = found.module
    if found.activation is not None and not takes_activation(norm):
        return f"{type(norm).__name__} has no fused activations"
    if flow is not None and flow.sites.get(norm, 0) > 1:
        return f"it is used {flow.sites[norm]} times in the forward"
    if flow is not None and flow.is_called_elsewhere(norm):
        return "it is called as well where the data flow cannot be followed"
    if has_hooks(norm):
        return "its hooks would see other values"
    if found.act_module is not None and has_hooks(found.act_module):
        return f"the hooks of {found.act_path} would see other values"
    add = found.add
    if add is not None and add.target in _IN_PLACE and add.args[0] is found.residual:
        return "the sum is written into what is added"
    return None


_IN_PLACE = frozenset({"add_", "__iadd__", operator.iadd})

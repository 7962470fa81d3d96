"""Forwards that are written anew, for what no setting of a layer can change.

A module whose forward adds a norm's output to something, or applies a function to it, gets a class
derived from its own. Its forward is the graph of the old one, with the norms called with what
follows them. It is used for calls like the one that was followed, while everything that the graph
took for granted is as it was; for all others the old forward is called, which is right as well.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from .._dataflow.calls import Pattern
from .._dataflow.flow import Root, join
from .._dataflow.hooks import has_hooks
from .._dataflow.trace import Read, UntraceableError, trace
from .._derived import Derived
from .carry_out import Group
from .fusions import Fusion, Refusal, in_graph


class Part(NamedTuple):
    """A module that the graph goes through, or leaves out: it must stay what it is."""

    path: str
    cls: type[torch.nn.Module]


class Code(NamedTuple):
    """A forward in one mode."""

    #: Of a function `forward(self, tensor_0, …)`, imports included.
    source: str
    reads: tuple[Read, ...]


class Plan:
    """The forwards of a module, and what they take for granted."""

    def __init__(self, pattern: Pattern, codes: Mapping[bool, Code], parts: Sequence[Part]) -> None:
        self.pattern = pattern
        self.codes = dict(codes)
        self.parts = tuple(parts)
        self._functions = {mode: _compile(code.source) for mode, code in self.codes.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Itself: nothing of it changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the compiled functions."""
        return Plan, (self.pattern, self.codes, self.parts)

    def function(self, module: torch.nn.Module) -> Callable[..., Any] | None:
        """The forward for the module as it is; None if something has changed."""
        for path, cls in self.parts:
            part = _follow(module, path)
            if type(part) is not cls or part._forward_hooks or part._forward_pre_hooks:
                return None
        for path, name, value in self.codes[module.training].reads:
            if getattr(_follow(module, path), name, _Missing) != value:
                return None
        return self._functions[module.training]


class _Missing:
    """What a deleted attribute is."""


def _follow(module: torch.nn.Module, path: str) -> torch.nn.Module:
    if path:
        for name in path.split("."):
            module = getattr(module, name)
    return module


def _compile(source: str) -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec(compile(source, "<forward that normally.fuse wrote>", "exec"), space)
    function: Callable[..., Any] = space["forward"]
    return function


class Generated(Derived):
    """Mixed into the class of a module whose forward was written anew."""

    _plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The new forward where it applies, else the old one."""
        tensors = self._plan.pattern.take(args, kwargs)
        module: Any = self
        if tensors is not None:
            function = self._plan.function(module)
            if function is not None:
                return function(module, *tensors)
        return self._base.forward(module, *args, **kwargs)


def write(group: Group[Fusion], fusions: Sequence[Fusion]) -> Plan:
    """The forwards of a group's owner with these fusions of it done.

    Args:
        group: the owner and all that is found in it.
        fusions: those that are done by its forward.

    Raises:
        UntraceableError: if it cannot be done.
    """
    owner = group.owner
    through = _between(group, fusions)
    for path, module in through.items():
        if has_hooks(module):
            raise UntraceableError(f"{path} has hooks, which would not be called")
    inside = set(through.values())
    codes = {}
    for mode in (False, True):
        traced = trace(owner.module, owner.pattern, mode, lambda m: m not in inside)
        root = owner._replace(traces={mode: traced})
        _rewrite(root, traced.graph, {fusion.path: str(fusion) for fusion in fusions})
        codes[mode] = Code(_source(traced.graph), traced.reads)
    acts = {f.act_path: f.act_module for f in fusions if f.act_module is not None}
    norms = {f.path: f.module for f in fusions}
    parts = [
        Part(group.inside(path), type(module))
        for path, module in {**through, **acts, **norms}.items()
    ]
    return Plan(owner.pattern, codes, parts)


def _between(group: Group[Fusion], fusions: Sequence[Fusion]) -> dict[str, torch.nn.Module]:
    """The modules, by path in the model, whose forwards are written into the owner's."""
    found = {}
    for fusion in fusions:
        for node in (fusion.norm, fusion.add, fusion.act):
            scope = "" if node is None else group.inside(fusion.root.scope(node))
            names = scope.split(".") if scope else []
            for depth in range(1, len(names) + 1):
                path = ".".join(names[:depth])
                found[join(group.owner.path, path)] = group.owner.module.get_submodule(path)
    return found


def _rewrite(root: Root, graph: torch.fx.Graph, wanted: dict[str, str]) -> None:
    left = dict(wanted)
    replaced: dict[torch.fx.Node, torch.fx.Node] = {}  # what one fusion adds may be another's sum
    for found in list(in_graph(root, graph)):
        if isinstance(found, Refusal) or wanted.get(found.path) != str(found):
            continue
        del left[found.path]
        options: dict[str, Any] = {}
        if found.residual is not None:
            options["residual"] = replaced.get(found.residual, found.residual)
        if found.activation is not None:
            options["act"], param = found.activation
            options |= {} if param is None else {"act_param": param}
        end = found.act if found.add is None or found.act is not None else found.add
        assert end is not None  # for mypy
        with graph.inserting_before(found.add or found.norm):
            new = graph.call_module(str(found.norm.target), found.norm.args, options)
        if found.add is not None:
            end.replace_all_uses_with(new)
            replaced[end] = new
        else:  # there may be views between the norm and its activation
            before = end.all_input_nodes[0]
            end.replace_all_uses_with(before)
            found.norm.replace_all_uses_with(new)
            replaced[found.norm] = new
            replaced[end] = new if before is found.norm else before
        for node in (found.act, found.add, found.norm):
            if node is not None:
                graph.erase_node(node)
    if left:
        raise UntraceableError(f"in its own forward {', '.join(left)} cannot be fused")
    graph.lint()


def _source(graph: torch.fx.Graph) -> str:
    code = graph.python_code("self")
    tree = ast.parse(code.src)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    function.name = "forward"
    return f"{_format_import_block(code.globals, sys_importer)}\n{ast.unparse(tree)}\n"

"""The data flow of a whole model: which module's output goes where.

The largest parts whose forwards can be followed are the roots; a part that cannot is one node of
the part around it, and is looked into for roots of its own. Where `torch.fx` fails, `torch.export`
is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ...nn._origin import family
from .._counterparts import COUNTERPARTS
from .._norms import is_ours
from . import activations
from .calls import Calls, Pattern
from .hooks import has_hooks
from .trace import Trace, UntraceableError, scope_of, trace

#: What may stand between two layers without changing a value: methods and functions.
_VIEWS = frozenset(
    {
        "view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
        "movedim", "swapaxes", "unflatten", "clone", "view_as", "reshape_as",
    }
)  # fmt: skip

#: What takes nothing but the shape or the type of an operand: of the first one, of another one.
_ASKS = frozenset({"size", "dim", "numel", "getattr", "ndimension"})
_TAKES_SHAPE = frozenset({"view_as", "reshape_as", "expand_as"})

#: What has weights that a norm can be folded into.
CONVOLUTIONS = (
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
    torch.nn.Linear,
)  # fmt: skip

_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


class Op(NamedTuple):
    """What a node of a graph is."""

    #: "norm", "act", "add", "weights" (convolution or linear), "view", "dropout" or "other".
    kind: str
    #: The module that is called, and its path in the model; None for functions.
    module: torch.nn.Module | None = None
    path: str = ""
    activation: activations.Activation | None = None


class Root(NamedTuple):
    """A part of the model whose data flow is known."""

    path: str
    module: torch.nn.Module
    pattern: Pattern
    #: By mode: the graph in evaluation and, where it is asked for, in training.
    traces: dict[bool, Trace]

    def op(self, node: torch.fx.Node) -> Op:
        """What a node is."""
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return classify(module, join(self.path, str(node.target)))
        if node.op not in ("call_function", "call_method"):
            return Op("other")
        activation = activations.of_function(node.target, node.args[1:], dict(node.kwargs))
        if activation is not None:
            return Op("act", activation=activation)
        if node.target in activations.ADDITIONS and set(node.kwargs) <= {"other"}:
            return Op("add")
        name = node.target if isinstance(node.target, str) else _name(node.target)
        return Op("view" if name in _VIEWS else "other")

    def scope(self, node: torch.fx.Node) -> str:
        """The path in the model of the module in whose forward the node is."""
        return join(self.path, scope_of(node))


def join(path: str, name: str) -> str:
    """One dotted path of two.

    >>> join("layer1", "0.bn"), join("", "bn"), join("layer1", "")
    ('layer1.0.bn', 'bn', 'layer1')
    """
    return ".".join(part for part in (path, name) if part)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether it is a normalization layer of torch, of ours, or converted."""
    return is_ours(module) or family(type(module), tuple(COUNTERPARTS)) is not None


def classify(module: torch.nn.Module, path: str) -> Op:
    """What a call of the module is."""
    if is_norm(module):
        return Op("norm", module, path)
    if isinstance(module, CONVOLUTIONS):
        return Op("weights", module, path)
    if isinstance(module, torch.nn.Identity | torch.nn.Flatten | torch.nn.Unflatten):
        return Op("view", module, path)
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return Op("dropout", module, path)
    activation = activations.of_module(module)
    if activation is not None:
        return Op("act", module, path, activation)
    return Op("other", module, path)


def is_leaf(module: torch.nn.Module) -> bool:
    """Whether a call of the module is one node, whatever is in it."""
    if classify(module, "").kind != "other":
        return True
    is_torchs = type(module).__module__.startswith(("torch.nn.", "torch.ao."))
    return is_torchs and not isinstance(module, _CONTAINERS)


def takers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Those who take a node's value, not its shape alone."""

    def takes(user: torch.fx.Node) -> bool:
        name = user.target if isinstance(user.target, str) else _name(user.target)
        if user.op in ("call_function", "call_method"):
            if name in _ASKS:
                return False
            if name in _TAKES_SHAPE:
                return user.args[0] is node
        return True

    return [user for user in node.users if takes(user)]


def _name(target: Callable[..., object]) -> str:
    return getattr(target, "__name__", "")


class Flow(NamedTuple):
    """What is known of a model's data flow."""

    roots: tuple[Root, ...]
    #: By path of what could not be followed: why.
    opaque: dict[str, str]
    #: By module: how often its calls stand in the graphs of all roots, in evaluation.
    sites: dict[torch.nn.Module, int]
    #: By module: how often that should be in a run of the example.
    expected: dict[torch.nn.Module, int]
    #: What was seen in a run of the example.
    calls: Calls

    def is_called_elsewhere(self, module: torch.nn.Module) -> bool:
        """Whether it was called where nothing could be followed."""
        return self.calls.counts.get(module, 0) != self.expected.get(module, 0)


def follow(model: torch.nn.Module, calls: Calls, *, both_modes: bool) -> Flow:
    """The data flow of a model that ran on an example.

    Args:
        model: it.
        calls: what was seen in the run.
        both_modes: follow training as well as evaluation.
    """
    opaque: dict[str, str] = {}
    closed: set[torch.nn.Module] = set()
    found: dict[torch.nn.Module, Root] = {}

    def stops(module: torch.nn.Module) -> bool:
        return module in closed or is_leaf(module)

    # From the inside out, so that what cannot be followed is a leaf for what is around it.
    for path, module in reversed(list(model.named_modules())):
        pattern = calls.patterns.get(module, "the example does not come to it")
        if isinstance(pattern, str) or (is_leaf(module) and path):
            continue  # perhaps part of a larger one
        if has_hooks(module):  # they may change what goes in and out
            closed.add(module)
            opaque[path] = "it has hooks"
        try:
            found[module] = _root(path, module, pattern, stops, both_modes)
        except UntraceableError as error:
            closed.add(module)
            opaque[path] = str(error)

    return flow_of(tuple(_largest(model, found, stops)), opaque, calls)


def flow_of(roots: tuple[Root, ...], opaque: dict[str, str], calls: Calls) -> Flow:
    """What the roots show together."""
    sites: dict[torch.nn.Module, int] = {}
    expected: dict[torch.nn.Module, int] = {}
    for root in roots:
        for node in root.traces[False].graph.nodes:
            if node.op == "call_module":
                module = root.module.get_submodule(node.target)
                sites[module] = sites.get(module, 0) + 1
                runs = calls.counts.get(root.module, 0)
                expected[module] = expected.get(module, 0) + runs
    return Flow(roots, opaque, sites, expected, calls)


def _root(
    path: str,
    module: torch.nn.Module,
    pattern: Pattern,
    stops: Callable[[torch.nn.Module], bool],
    both_modes: bool,
) -> Root:
    def is_leaf_of_this(m: torch.nn.Module) -> bool:
        return m is not module and stops(m)

    modes = (False, True) if both_modes else (False,)
    traces = {mode: trace(module, pattern, mode, is_leaf_of_this) for mode in modes}
    return Root(path, module, pattern, traces)


def _largest(
    module: torch.nn.Module,
    found: dict[torch.nn.Module, Root],
    stops: Callable[[torch.nn.Module], bool],
) -> Iterator[Root]:
    """The roots that are in no other, each once."""
    seen: set[torch.nn.Module] = set()

    def visit(module: torch.nn.Module, inside: bool) -> Iterator[Root]:
        if module in seen:
            return
        seen.add(module)
        root = found.get(module)
        if root is not None and not inside:
            yield root
        # A list of layers is called by nobody; the graph of what it is in goes on inside of it.
        inside = inside or root is not None
        for child in module.children():
            yield from visit(child, inside and not stops(child))

    yield from visit(module, False)

"""The data flow of a module's forward, by `torch.fx`, and only where that is the whole truth.

Symbolic tracing runs the forward once with stand-ins for tensors, and is silent about what it does
not see: branches on plain attributes, settings such as `torch.no_grad()` and autocast, activation
checkpoints, random numbers, attributes that a forward sets, additions in place. Here each of these
is seen: attributes are noted, in-place operators are kept, and the others end the trace.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.fx.graph import inplace_methods

from .calls import Pattern, evaluating


class UntraceableError(Exception):
    """Why a forward cannot be followed."""


class Read(NamedTuple):
    """An attribute that the forward has looked at."""

    #: The module's path, from the traced one.
    path: str
    name: str
    value: Any


class Trace(NamedTuple):
    """A forward as a graph."""

    graph: torch.fx.Graph
    reads: tuple[Read, ...]


def trace(
    module: torch.nn.Module,
    pattern: Pattern,
    training: bool,
    is_leaf: Callable[[torch.nn.Module], bool],
) -> Trace:
    """Follow the forward of a module that is called in one way, in one mode.

    Args:
        module: whose forward.
        pattern: of the call; the graph's placeholders are its tensors.
        training: the mode of all modules.
        is_leaf: which modules are one node; the forwards of others are followed, too.

    Raises:
        UntraceableError: if the graph would not be all that the forward does.
    """
    reads: dict[tuple[str, str], Any] = {}
    tracer = _Tracer(is_leaf)
    state = _random_state()
    try:
        with evaluating(module, training), _recording(module, pattern, is_leaf, reads):
            graph = tracer.trace(module)
        if not _equal_states(state, _random_state()):
            raise UntraceableError("its forward draws random numbers")
    except UntraceableError:
        raise
    except Exception as error:  # torch.fx raises of many kinds; so may the forward itself
        first = str(error).strip().partition("\n")[0]
        raise UntraceableError(
            f"torch.fx cannot trace it ({type(error).__name__}: {first[:120]})"
        ) from error
    finally:
        random.setstate(state[0])
        torch.set_rng_state(state[1])
    if any(
        node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes
    ):
        raise UntraceableError("its forward makes tensors that a trace would keep")
    return Trace(graph, tuple(Read(*key, value) for key, value in reads.items()))


def scope_of(node: torch.fx.Node) -> str:
    """The path, from the traced module, of the one in whose forward the node was made."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and stack:
        stack.pop()
    return stack[-1] if stack else ""


class _Proxy(torch.fx.Proxy):
    """`x += y` stays what it is; torch.fx takes it for x = x + y."""


def _in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    function = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(torch.fx.Tracer):
    traced_func_name = "_call_pattern"

    def __init__(self, is_leaf: Callable[[torch.nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._settings = _settings()

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _settings() != self._settings:
            raise UntraceableError("its forward changes grad mode or autocast")
        if _is_checkpointed():
            raise UntraceableError("its forward is an activation checkpoint")
        return super().create_node(*args, **kwargs)


def _settings() -> tuple[Any, ...]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    autocast = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _is_checkpointed() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def _random_state() -> tuple[Any, torch.Tensor]:
    return random.getstate(), torch.get_rng_state()


def _equal_states(a: tuple[Any, torch.Tensor], b: tuple[Any, torch.Tensor]) -> bool:
    return a[0] == b[0] and torch.equal(a[1], b[1])


#: What every module has: torch's own business.
_INTERNAL = frozenset(vars(torch.nn.Module())) - {"training"} | {"_origins"}

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def _recording(
    root: torch.nn.Module,
    pattern: Pattern,
    is_leaf: Callable[[torch.nn.Module], bool],
    reads: dict[tuple[str, str], Any],
) -> Iterator[None]:
    """Modules note which of their attributes are read, and refuse that they are set."""
    with ExitStack() as stack:
        for path, module in _followed(root, is_leaf):
            members = _members(path, reads)
            if module is root:
                members["_call_pattern"] = _call_of(type(root), pattern)
            cls = type(module)
            spy = type(cls.__name__, (cls,), {"__module__": cls.__module__, **members})
            stack.callback(object.__setattr__, module, "__class__", cls)
            object.__setattr__(module, "__class__", spy)
        yield


def _followed(
    root: torch.nn.Module, is_leaf: Callable[[torch.nn.Module], bool], path: str = ""
) -> Iterator[tuple[str, torch.nn.Module]]:
    yield path, root
    for name, child in root.named_children():
        if not is_leaf(child):
            yield from _followed(child, is_leaf, f"{path}.{name}" if path else name)


def _members(path: str, reads: dict[tuple[str, str], Any]) -> dict[str, Any]:
    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in _INTERNAL or name.startswith("__"):
            return value
        if isinstance(value, _PLAIN) and name in object.__getattribute__(self, "__dict__"):
            reads[path, name] = value
        return value

    def refuse(self: Any, name: str, value: Any) -> None:
        raise UntraceableError(f"its forward sets the attribute {name}")

    return {"__getattribute__": read, "__setattr__": refuse}


def _call_of(cls: Any, pattern: Pattern) -> Callable[..., Any]:
    """A forward whose parameters are the tensors of the pattern, by number."""

    def call(self: Any, *tensors: Any) -> Any:
        args, kwargs = pattern.fill(tensors)
        return cls.forward(self, *args, **kwargs)

    names = ", ".join(f"tensor_{i}" for i in range(pattern.tensors))
    space: dict[str, Any] = {"call": call}
    exec(f"def _call_pattern(self, {names}):\n    return call(self, {names})\n", space)
    function: Callable[..., Any] = space["_call_pattern"]
    return function

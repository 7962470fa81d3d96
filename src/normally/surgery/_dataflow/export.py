"""The data flow of forwards that `torch.fx` cannot follow, by `torch.export`.

An export runs the forward on real values, so branches on shapes and types are no obstacle. It sees
operators, and of each the modules that it was called in; here the operators of a leaf become one
node again, and what is left has the form of a trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .calls import Pattern, evaluating
from .flow import Flow, Root, flow_of, is_leaf
from .hooks import ours
from .trace import Trace


def follow(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flow: Flow,
    undecided: Sequence[str],
    *,
    both_modes: bool,
) -> list[Flow]:
    """What `flow` lacks around the modules at these paths, where it can be had.

    Args:
        model: it.
        args: of the example.
        kwargs: of the example.
        flow: what is known.
        undecided: paths of norms whose surroundings are not known.
        both_modes: follow training as well as evaluation.

    Returns:
        One flow for each part that was exported, the largest parts possible.
    """
    flows: list[Flow] = []
    done: list[str] = []
    # The outermost first: an export of a part serves all that is inside of it.
    for path, reason in sorted(flow.opaque.items(), key=lambda item: item[0].count(".")):
        inside = [p for p in undecided if _is_inside(p, path)]
        if not inside or reason == "it has hooks" or any(_is_inside(path, d) for d in done):
            continue
        module = model.get_submodule(path)
        pattern = flow.calls.patterns.get(module)
        call = _call_of(model, module, args, kwargs)
        if call is None or not isinstance(pattern, Pattern):
            continue
        modes = (False, True) if both_modes else (False,)
        try:
            traces = {mode: _export(module, call, mode) for mode in modes}
        except Exception:  # torch.export raises of many kinds; the report has torch.fx's reason
            continue
        done.append(path)
        flows.append(flow_of((Root(path, module, pattern, traces),), {}, flow.calls))
    return flows


def _is_inside(path: str, other: str) -> bool:
    return other == "" or path == other or path.startswith(f"{other}.")


def _call_of(
    model: torch.nn.Module,
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the module gets on the example."""
    if module is model:
        return tuple(args), dict(kwargs)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(
        ours(lambda _, args, kwargs: seen.append((args, kwargs))), with_kwargs=True
    )
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0] if seen else None


def _export(
    module: torch.nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], training: bool
) -> Trace:
    with evaluating(module, training), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, *call, strict=False)
    inputs = set(program.graph_signature.user_inputs)
    graph = torch.fx.Graph()
    new: dict[torch.fx.Node, Any] = {}
    leaves: dict[str, torch.fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            new[node] = graph.placeholder(node.name) if node.name in inputs else None
        elif node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], new.get))
        else:
            new[node] = _copy(module, node, graph, new, leaves)
    return Trace(graph, ())


def _copy(
    module: torch.nn.Module,
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    new: dict[torch.fx.Node, Any],
    leaves: dict[str, torch.fx.Node],
) -> torch.fx.Node | None:
    """The node of the new graph that stands for this one: its own, or that of the leaf it is in."""
    stack = node.meta.get("nn_module_stack", {})
    for key, (path, *_) in stack.items():
        if not path or not is_leaf(module.get_submodule(path)):
            continue
        if key not in leaves:
            values = [new[n] for n in node.all_input_nodes if new.get(n) is not None]
            if not values:
                return None  # of its parameters and buffers alone, such as a counter
            leaves[key] = graph.call_module(path, tuple(values))
            leaves[key].meta["nn_module_stack"] = _as_traced(stack)
        return leaves[key]
    name = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.rpartition("::")[2]
    args = torch.fx.map_arg(node.args, lambda n: new[n])
    kwargs = torch.fx.map_arg(dict(node.kwargs), lambda n: new[n])
    copied = graph.call_method(name, args, kwargs)
    copied.meta["nn_module_stack"] = _as_traced(stack)
    return copied


def _as_traced(stack: Mapping[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """The modules below the exported one, as `torch.fx` notes them."""
    return {key: value for key, value in stack.items() if value[0]}

"""`fuse`: norms, and what follows them, as one kernel."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from ..nn._origin import go_back
from ._dataflow import export
from ._dataflow.calls import as_call, observe
from ._dataflow.flow import Flow, follow
from ._pairs.carry_out import Verb, carry_out, output_deviation
from ._pairs.fusing import VERB, plan
from ._pairs.fusions import Fusion, Refusal, find
from ._report import Change, Report
from ._walk import Selection, walk
from .convert import convert_layer


@overload
def fuse(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def fuse(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def fuse(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Make norm → activation and norm → add → activation one kernel each, in place.

    They are found by data flow, not by names: the model runs once on the example, its forwards are
    followed (`torch.fx`; `torch.export` where that cannot), and an activation is one whether it is a module, a function or a method.
    Where a module applies the activation, the norm gets it as `act` and the module passes on what
    it gets. Where a function applies it, or something is added before, the module in whose forward
    that happens gets a forward of its own, written from the graph; for calls unlike the example's,
    or after a change of something that the graph took for granted, its old forward is called.
    For training and for evaluation.

    A fusion is kept if two copies of the module around it, one fused, give the same outputs,
    gradients and running statistics on the example in float64. All others leave the model as it
    was, and the report says why. Parameters, state dict keys, hooks, training flags and what an
    optimizer holds stay; norms of torch's are converted as by `convert`. `revert` takes all of it
    back.

    Args:
        model: any module.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. A small batch will do.
        only: names, patterns or a function of (path, module) that say which norms.
        skip: the same for norms to leave.
        return_report: return `(model, report)`; the report has a line a norm, with the largest
            deviation found, and that of the model's output in its own dtype.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is no module, or `example_inputs` no arguments.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> fuse(model, torch.randn(2, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, act='relu')
      (2): FusedActivation(relu of 1)
    )
    """  # noqa: E501
    args, kwargs = as_call(example_inputs, VERB)
    chosen = {module for _, module in walk(model, only, skip, VERB)}
    calls = observe(model, args, kwargs)
    flow = follow(model, calls, both_modes=True)
    found = _candidates(flow, chosen)
    for other in export.follow(model, args, kwargs, flow, _at_edges(flow, chosen), both_modes=True):
        found = _candidates(other, chosen) | found
    changes = [f.line() for f in found.values() if isinstance(f, Refusal)]
    fusions, converted, refused = _convert([f for f in found.values() if isinstance(f, Fusion)])
    verb = Verb[Fusion](
        name=VERB,
        plan=plan,
        note=lambda fusion: f"{fusion} in one kernel",
        modes=(False, True),
        gradients=True,
    )
    changes += [*refused, *carry_out(model, args, kwargs, fusions, flow, verb)]
    fused = {change.path for change in changes if change.done}
    for path, norm in converted.items():
        if path not in fused:  # it stays what it was
            go_back(norm, "convert")
    deviation = output_deviation(model, args, kwargs, calls.output) if fused else None
    report = Report(VERB, tuple(changes), deviation)
    return (model, report) if return_report else model


def _candidates(flow: Flow, chosen: set[torch.nn.Module]) -> dict[str, Fusion | Refusal]:
    """By path: the fusions that are the same in both modes, and what comes near to one."""
    found: dict[bool, dict[str, Fusion | Refusal]] = {False: {}, True: {}}
    for mode, by_path in found.items():
        for candidate in find(flow, mode):
            if candidate.module in chosen:
                by_path.setdefault(candidate.path, candidate)
    same: dict[str, Fusion | Refusal] = {}
    for path, candidate in (found[True] | found[False]).items():
        one, other = found[False].get(path), found[True].get(path)
        refusals = [f for f in (one, other) if isinstance(f, Refusal)]
        if refusals:
            same[path] = refusals[0]
        elif isinstance(one, Fusion) and isinstance(other, Fusion) and one.is_like(other):
            same[path] = one
        else:
            reason = "what follows it in training is not what follows it in evaluation"
            same[path] = Refusal(path, candidate.module, reason)
    return same


def _at_edges(flow: Flow, chosen: set[torch.nn.Module]) -> list[str]:
    """Paths of norms whose output leaves what can be followed, or that are not in it at all.

    Of those that images have: the others are not seen before an activation.
    """
    inside = {
        root.module.get_submodule(node.target)
        for root in flow.roots
        for node in root.traces[False].graph.nodes
        if node.op == "call_module" and all(user.op != "output" for user in node.users)
    }
    kinds = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm)
    return [
        path
        for path, module in flow.calls.paths.items()
        if module in chosen and module not in inside and isinstance(module, kinds)
    ]


def _convert(
    found: list[Fusion],
) -> tuple[list[Fusion], dict[str, torch.nn.Module], list[Change]]:
    """The fusions whose norms are ours, what was converted for that, and lines for the others."""
    ours, converted, refused = [], {}, []
    for fusion in found:
        change = convert_layer(fusion.path, fusion.module, {})
        if change is not None and not change.done:
            refused.append(change)
            continue
        ours.append(fusion)
        if change is not None:
            converted[fusion.path] = fusion.module
    return ours, converted, refused

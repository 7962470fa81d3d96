"""`fold`: norms become part of the weights of the layer before them, for inference."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, overload

import torch

from ..nn._origin import go_back
from ._dataflow import export
from ._dataflow.calls import as_call, observe
from ._dataflow.flow import Flow, follow, is_norm
from ._pairs.carry_out import Verb, carry_out, output_deviation
from ._pairs.folding import VERB, plan
from ._pairs.folds import Fold, find, has_statistics
from ._pairs.fusions import Refusal
from ._report import Change, Report
from ._walk import Selection, walk
from .convert import convert_layer


@overload
def fold(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[False] = False,
) -> torch.nn.Module: ...
@overload
def fold(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: Literal[True],
) -> tuple[torch.nn.Module, Report]: ...
def fold(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    only: Selection = None,
    skip: Selection = None,
    return_report: bool = False,
) -> torch.nn.Module | tuple[torch.nn.Module, Report]:
    """Fold norms with running statistics into the layer before them, in place, for inference.

    In evaluation a batch norm is y = x * scale + shift, with

        scale = weight / √(running_var + eps)    shift = bias - running_mean * scale

    and a convolution, transposed convolution or linear layer before it can give that at once:
    weight * scale and bias * scale + shift, by output channel (Jacob et al. 2018,
    arXiv:1712.05877, 3.2). The products are taken in float64 and rounded once. The norm is left as
    a module without parameters that passes on, with its activation where it has one; a layer
    without a bias gets one.

    Which layer is before a norm is found by data flow: the model runs once on the example, and its
    forwards are followed in evaluation (`torch.fx`; `torch.export` where that cannot), through
    views and nested modules. A fold is kept if two
    copies of the module around it, one folded, give the same output on the example in float64. A
    layer that is used several times, whose output somebody else takes as well, whose parameters
    another module has, or that has hooks is left with the reason.

    There is no way back: fold a copy (`copy.deepcopy`) if the model is to be trained further.

    Args:
        model: any module; what it computes in evaluation is kept.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments.
        only: names, patterns or a function of (path, module) that say which norms.
        skip: the same for norms to leave.
        return_report: return `(model, report)`; the report has a line a norm, with the largest
            deviation found, and that of the model's output in its own dtype.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is no module, or `example_inputs` no arguments.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    >>> fold(model.eval(), torch.randn(2, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): FoldedNorm()
    )
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias']
    """
    args, kwargs = as_call(example_inputs, VERB)
    chosen = {module for _, module in walk(model, only, skip, VERB)}
    # Norms of other libraries are looked at as ours.
    converted = [m for p, m in model.named_modules() if _is_foreign(p, m)]
    calls = observe(model, args, kwargs)
    flow = follow(model, calls, both_modes=False)
    found = _look(flow, chosen)
    undecided = [path for path, result in found.items() if isinstance(result, Refusal)]
    undecided += [c.path for c in _unseen(model, chosen, found)]
    for other in export.follow(model, args, kwargs, flow, undecided, both_modes=False):
        for path, result in _look(other, chosen).items():
            if path not in found or isinstance(result, Fold):
                found[path] = result
    changes = [f.line() for f in found.values() if isinstance(f, Refusal)]
    findings = [f for f in found.values() if isinstance(f, Fold)]
    verb = Verb[Fold](
        name=VERB,
        plan=plan,
        note=lambda fold: f"folded into {fold.weights_path}",
        modes=(False,),
        gradients=False,
    )
    changes += carry_out(model, args, kwargs, findings, flow, verb)
    for norm in converted:
        go_back(norm, "convert")
    changes += _unseen(model, chosen, found)
    has_changed = any(change.done for change in changes)
    deviation = output_deviation(model, args, kwargs, calls.output) if has_changed else None
    report = Report(VERB, tuple(changes), deviation)
    return (model, report) if return_report else model


def _is_foreign(path: str, module: torch.nn.Module) -> bool:
    """Whether it is a norm of another library, which is converted now."""
    if is_norm(module):
        return False
    change = convert_layer(path, module, {})
    return change is not None and change.done


def _look(flow: Flow, chosen: set[torch.nn.Module]) -> dict[str, Fold | Refusal]:
    """What the flow shows of the norms, by path."""
    found: dict[str, Fold | Refusal] = {}
    for result in find(flow):
        if result.module in chosen:
            found.setdefault(result.path, result)
    return found


def _unseen(
    model: torch.nn.Module, chosen: set[torch.nn.Module], seen: Container[str]
) -> list[Change]:
    """Lines for norms that the data flow did not show."""
    return [
        Change(path, type(module).__name__, False, "the data flow around it cannot be followed")
        for path, module in model.named_modules()
        if module in chosen and path not in seen and has_statistics(module)
    ]

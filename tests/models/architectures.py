"""Real architectures with random weights, and what convert, fuse and fold promise for each."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import normally
from normally.surgery import FoldedNorm, Report

#: float64, relative to the largest value of its kind: rounding, blown up by up to 100 layers whose
#: batch norms divide by small deviations. A wrong wire or a lost eps is 1e-3 and more.
ROUNDING = 1e-6


@dataclass
class Seen:
    """What became of a model."""

    converted: Report
    fused: Report | None = None
    folded: Report | None = None
    deviations: dict[str, float] = field(default_factory=dict)


def settle(model: nn.Module) -> nn.Module:
    """float64, with running statistics and parameters of norms that show."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            noise = torch.rand(module.running_mean.shape, generator=generator, dtype=torch.float64)
            module.running_mean.copy_(noise - 0.5)
            module.running_var.copy_(noise + 0.5)
    return model


def outcome(model: nn.Module, call: dict[str, Any], training: bool) -> list[list[Tensor]]:
    """Outputs, gradients of parameters, buffers; of a copy."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(1)
    outputs = [t for t in pytree.tree_leaves(model(**call)) if isinstance(t, Tensor)]
    differentiable = [t for t in outputs if t.requires_grad]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in differentiable]
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(differentiable, wanted, weights, allow_unused=True)
    return [
        [t.detach() for t in outputs],
        [torch.zeros(()) if g is None else g for g in gradients],
        [b.double() for name, b in model.named_buffers() if "_skipped" not in name],
    ]


def deviation(expected: list[list[Tensor]], found: list[list[Tensor]]) -> float:
    """The largest, relative to the largest value of its kind."""
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        whole = max((float(t.abs().max()) for t in one if t.numel()), default=0.0)
        for a, b in zip(one, other, strict=True):
            if a.numel():
                largest = max(largest, float((a - b).abs().max()) / max(whole, 1e-300))
    return largest


def walk(
    model: nn.Module, call: dict[str, Any], *, fuse: bool = True, gradients: bool = True
) -> Seen:
    """Convert, fuse, fold and revert a model; AssertionError where a promise is broken."""
    model = settle(model)
    twin = copy.deepcopy(model)
    classes = [(path, type(module)) for path, module in model.named_modules()]
    keys = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    modes = (False, True) if gradients else (False,)
    expected = {mode: outcome(twin, call, mode) for mode in modes}

    model, report = normally.convert(model, return_report=True)
    seen = Seen(report)
    assert list(model.state_dict()) == keys
    for mode in modes:
        seen.deviations[f"convert {mode}"] = deviation(expected[mode], outcome(model, call, mode))
    if fuse:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own
            model, seen.fused = normally.fuse(model, call, return_report=True)
        assert list(model.state_dict()) == keys
        for mode in modes:
            seen.deviations[f"fuse {mode}"] = deviation(expected[mode], outcome(model, call, mode))
        folded, seen.folded = normally.fold(copy.deepcopy(model), call, return_report=True)
        torch.manual_seed(1)
        with torch.no_grad():
            found = [t for t in pytree.tree_leaves(folded.eval()(**call)) if isinstance(t, Tensor)]
        seen.deviations["fold"] = deviation(expected[False][:1], [found])
        assert sum(isinstance(m, FoldedNorm) for m in folded.modules()) == len(seen.folded.changed)
    normally.revert(model)
    assert [(path, type(module)) for path, module in model.named_modules()] == classes
    assert [id(p) for p in model.parameters()] == parameters
    for (name, a), (_, b) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    worst = max(seen.deviations.values())
    assert worst <= ROUNDING, seen.deviations
    return seen

"""What is timed: the two halves of a training step and the whole, on tensors of the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import measure
from ..measure import Step
from ..operator import Case, Operator


def make_inputs(case: Case, device: torch.device, seed: int = 0, mean: float = 0.0) -> list[Tensor]:
    """The input around `mean`, and the residual around 0, made where they are used."""
    generator = torch.Generator(device).manual_seed(seed)
    means = (mean, 0.0) if case.has_residual else (mean,)
    return [_normal(case, generator, m) for m in means]


def make_grads(operator: Operator, case: Case, device: torch.device) -> list[Tensor]:
    """A gradient for each output."""
    generator = torch.Generator(device).manual_seed(1)
    return [_normal(case, generator, 0.0) for _ in range(operator.outputs)]


def make_step(
    module: nn.Module, inputs: Sequence[Tensor], mode: str, grads: Sequence[Tensor]
) -> Step:
    """As `measure.make_step`; "backward" runs the forward once, now, and only its backward then."""
    if mode != "backward":
        return measure.make_step(module, inputs, mode, grads)
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    outputs = module(*inputs)
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def _normal(case: Case, generator: torch.Generator, mean: float) -> Tensor:
    values = torch.randn(case.shape.size, generator=generator, device=generator.device)
    rounded = values.add_(mean).to(case.torch_dtype)
    return rounded.contiguous(memory_format=case.memory_format)

"""`memory_efficient=True`: less is kept, the bits are the same, and what was changed is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normally
from normally import nn
from normally.functional import _recompute, batch_norm
from tests.device import IS_CPU
from tests.helpers import assert_same_bits
from tests.surgery.models import Residual


class Chain(torch.nn.Module):
    """conv → norm → conv → norm → conv → norm, the last two with a residual."""

    def __init__(self, memory_efficient: bool, act: str | None = "relu", **options: Any) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = torch.nn.ModuleList(
            nn.BatchNorm2d(4, act=act, memory_efficient=memory_efficient, **options)
            for _ in range(4)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), residual=x if i else None, mask=mask)
        return x


def twins(make: Callable[[bool], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model without and with."""
    plain, efficient = make(False), make(True)
    efficient.load_state_dict(plain.state_dict())
    return plain, efficient


def recipes(output: Tensor) -> int:
    """How many saved tensors behind an output are recipes."""
    found, nodes, seen = 0, [output.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not isinstance(node, torch.autograd.function.BackwardCFunction):
            for name in _recompute._names(type(node)):
                hook = getattr(node, name).unpack_hook
                found += hook is _recompute.Recipe.compute
        nodes.extend(before for before, _ in node.next_functions)
    return found


def assert_same_step(
    plain: torch.nn.Module, efficient: torch.nn.Module, *inputs: Any, expected: int | None = None
) -> None:
    """Outputs, gradients and buffers of one step have the same bits."""
    results = []
    for model in (plain, efficient):
        x = inputs[0].clone().requires_grad_()
        output = model(x, *inputs[1:])
        if expected is not None and IS_CPU:
            assert recipes(output) == (expected if model is efficient else 0)
        (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([output.detach(), x.grad, *gradients, *model.buffers()])
    for one, other in zip(*results, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits(act: str | None, layout: torch.memory_format, dtype: torch.dtype) -> None:
    plain, efficient = twins(lambda m: Chain(m, act).to(dtype).to(memory_format=layout))
    x = torch.randn(3, 4, 9, 7, dtype=dtype).to(memory_format=layout)
    assert_same_step(plain, efficient, x, expected=3)

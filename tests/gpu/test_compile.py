"""torch.compile on a GPU: one graph, and what eager gives."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.device import DEVICE
from tests.gpu.layers import LAYERS, assert_same_buffers, cotangent, make, sample, step

pytestmark = pytest.mark.filterwarnings(
    # torch's compiler, not ours: it scripts decompositions on import.
    r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_eager(name: str, mode: str) -> None:
    """With "reduce-overhead" in a CUDA graph of torch's own making, from the third step on."""
    layer, g = make(name), cotangent(name)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(4):
        x = sample(name, seed)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g)]
        for ours, plain in zip(found, step(eager, x, g), strict=True):
            # The kernels are the same; what torch runs around them may be fused, and round once.
            scale = float(plain.abs().max())
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6 * scale)
    for (buffer, ours), plain in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6, msg=buffer)


def test_a_network_of_all_kinds() -> None:
    """Between convolutions, with what follows each norm fused by torch."""
    names = ("BatchNorm2d", "BatchNorm2d, evaluation", "FrozenBatchNorm")  # all of 64 channels
    layers: list[torch.nn.Module] = []
    for name in names:
        layers += [torch.nn.Conv2d(64, 64, 3, padding=1).to(DEVICE), make(name), torch.nn.SiLU()]
    network = torch.nn.Sequential(*layers)
    eager = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True)
    x, g = sample(names[0]), cotangent(names[0])
    for _ in range(2):
        results = []
        for module, model in ((compiled, network), (eager, eager)):
            y = module(x)
            results.append((y, *torch.autograd.grad(y, [x, *model.parameters()], g)))
        for ours, plain in zip(*results, strict=True):
            # Convolutions of 576 terms in the order that torch picks for each, and the bias before
            # a batch norm, whose gradient is 0 but for the rounding of 12544 terms.
            scale = max(1.0, float(plain.detach().abs().max()))
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "RMSNorm", "GroupNorm"])
def test_without_a_gradient(name: str) -> None:
    layer = make(name)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for seed in range(2):
            x = sample(name, seed)
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-6, atol=1e-6)
    assert_same_buffers(layer, eager)

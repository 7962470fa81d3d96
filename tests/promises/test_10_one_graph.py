"""Promise 10: one graph, under torch.compile(fullgraph=True) and torch.export."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import nn
from normally.functional import batch_norm
from tests.helpers import ACTS, spread, values

# torch's compiler, not ours: it scripts decompositions on import.
pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"
    ),
    pytest.mark.usefixtures("born_on_device"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def compare(layer: torch.nn.Module, backend: str, *inputs: Tensor, steps: int = 2) -> None:
    """The compiled layer and its copy in eager: outputs, gradients and every buffer, twice."""
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for step in range(steps):
        results = []
        for module in (compiled, eager):
            leaves = [(t + step).detach().requires_grad_() for t in inputs]
            y = module(*leaves)
            present = (
                [*leaves, *layer.parameters()]
                if module is compiled
                else [*leaves, *eager.parameters()]
            )
            g = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
            results.append((y, *torch.autograd.grad(y, present, g)))
        # Gradients may have other strides: eager hands a residual the gradient it was given.
        assert results[0][0].stride() == results[1][0].stride()
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for (name, ours), plain in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, msg=name)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "no momentum": {"momentum": 0.0},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "biased": {"unbiased": False, "correction": 1},
    "running": {"on_single_value": "running"},
    "channels last": {"channel_dim": -1},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, training: bool) -> None:
    layer = nn.BatchNorm1d(4, **VARIANTS[variant]).train(training)
    compare(layer, "aot_eager", values((6, 4, 4), torch.float32))


@spread("act, training", ACTS, (True, False))
def test_activations_and_residuals(act: str | None, training: bool) -> None:
    layer = nn.BatchNorm2d(3, act=act).train(training)
    x = values((4, 3, 5, 5), torch.float32).contiguous(memory_format=torch.channels_last)
    compare(layer, "aot_eager", x, values((4, 3, 5, 5), torch.float32, seed=1), steps=1)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_half_inputs_and_layouts(layer: type[nn.BatchNorm2d]) -> None:
    shape = {"1": (4, 3, 5), "2": (4, 3, 5, 2), "3": (4, 3, 5, 2, 2)}[layer.__name__[-2]]
    x = values(shape, torch.float32).movedim(1, -1).contiguous().movedim(-1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.compiler.reset()
        compiled = torch.compile(layer(3), backend="aot_eager", fullgraph=True)
        y = compiled(x.to(dtype))
        assert y.dtype is dtype
        assert y.stride() == x.stride()
        torch.testing.assert_close(y, layer(3)(x.to(dtype)))


@spread("momentum, training", (None, 0.1), (True, False))
def test_inductor(momentum: float | None, training: bool) -> None:
    layer = nn.BatchNorm2d(3, momentum=momentum, act="relu").train(training)
    x = values((4, 3, 6, 6), torch.float32)
    compare(layer, "inductor", x, values((4, 3, 6, 6), torch.float32, seed=1))


def test_inside_a_network_with_checkpointed_momentum() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, act="relu"),
        torch.nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, momentum=None, act="silu"),
    )  # fmt: skip
    compare(network, "aot_eager", values((2, 3, 8, 8), torch.float32))


def test_dynamic_batch_compiles_once() -> None:
    layer = nn.BatchNorm2d(3, act="relu")
    eager = copy.deepcopy(layer)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for batch in (5, 7, 11):
        x = values((batch, 3, 4, 4), torch.float32)
        torch.testing.assert_close(compiled(x), eager(x))
    assert len(graphs) == 1
    torch.testing.assert_close(layer.running_var, eager.running_var)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_export(momentum: float | None, training: bool, dynamic: bool) -> None:
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=momentum, act="gelu")
    ).train(training)
    eager = copy.deepcopy(network)
    shapes = {"input": {0: torch.export.Dim("batch", min=2)}} if dynamic else None
    program = torch.export.export(
        network, (torch.randn(6, 4),), dynamic_shapes=shapes, strict=False
    )
    module = program.module()
    for batch in (6, 9) if dynamic else (6, 6):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(module(x), eager(x))
    for name, value in eager.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], value, msg=name)


def test_function_with_every_argument() -> None:
    def call(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        return batch_norm(
            x, mean, var, training=True, momentum=None, num_batches_tracked=count,
            residual=residual, act="leaky_relu", act_param=0.3, channel_dim=2, correction=1,
        )  # fmt: skip

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        buffers = torch.zeros(5), torch.ones(5), torch.tensor(0)
        x, residual = values((4, 3, 5), torch.float32), values((3, 1), torch.float32)
        results.append((function(x, residual, *buffers), *buffers))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_double_backward_through_a_compiled_layer_is_right_or_raises() -> None:
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = values((5, 3), torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.sum().backward()


def test_error_inside_a_compiled_layer_is_still_readable() -> None:
    layer = nn.BatchNorm1d(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(torch.ones(1, 3))


def test_variants_are_distinct() -> None:
    names = [tuple(sorted(options.items())) for options in VARIANTS.values()]
    assert all(a != b for a, b in itertools.combinations(names, 2))

"""Promise 10 for all norms with their masks: one graph under torch.compile and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normally import functional, nn
from tests import norms
from tests.helpers import spread, values
from tests.norms import Norm

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


#: A layer, and the shape of its input.
Make = Callable[[], torch.nn.Module]
ROWS, CHANNELS = (6, 5, 8), (6, 8, 5)
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), ROWS),
    "LayerNorm of 2 dims": (lambda: nn.LayerNorm((5, 8), bias=False), ROWS),
    "LayerNorm dim=1": (lambda: nn.LayerNorm(8, dim=1, act="gelu"), CHANNELS),
    "LayerNorm, not affine": (lambda: nn.LayerNorm(8, elementwise_affine=False), ROWS),
    "RMSNorm": (lambda: nn.RMSNorm(8), ROWS),
    "RMSNorm llama": (lambda: nn.RMSNorm(8, 1e-6, casting="llama"), ROWS),
    "RMSNorm gemma": (
        lambda: nn.RMSNorm(8, 1e-6, casting="gemma", zero_centered_weight=True), ROWS,
    ),
    "RMSNorm of 2 dims": (lambda: nn.RMSNorm((5, 8)), ROWS),
    "GroupNorm": (lambda: nn.GroupNorm(4, 8, act="silu"), CHANNELS),
    "GroupNorm, no bias": (lambda: nn.GroupNorm(1, 8, bias=False), CHANNELS),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(8), CHANNELS),
    "InstanceNorm1d, affine": (lambda: nn.InstanceNorm1d(8, affine=True, act="relu"), CHANNELS),
    "InstanceNorm1d, tracking": (
        lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True), CHANNELS,
    ),
    "InstanceNorm1d, cumulative": (
        lambda: nn.InstanceNorm1d(8, momentum=None, track_running_stats=True), CHANNELS,
    ),
    "InstanceNorm1d, evaluation": (
        lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True).eval(), CHANNELS,
    ),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(3, alpha=0.5), CHANNELS),
    "FrozenBatchNorm": (lambda: nn.FrozenBatchNorm(8), CHANNELS),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8, act="silu"), CHANNELS),
    "BatchNorm1d, cumulative": (lambda: nn.BatchNorm1d(8, momentum=None), CHANNELS),
    "BatchNorm1d, evaluation": (lambda: nn.BatchNorm1d(8).eval(), CHANNELS),
}  # fmt: skip


def masked(n: int) -> dict[str, Tensor]:
    """A mask for an input of n samples with 5 positions."""
    return {"mask": torch.arange(5) < (torch.arange(n) % 6).view(-1, 1)}


def of_lengths(n: int, name: str) -> dict[str, Tensor]:
    """The lengths of that mask; two normalized dimensions leave none for lengths."""
    return masked(n) if "2 dims" in name else {"lengths": torch.arange(n) % 6}


def step(
    layer: torch.nn.Module, function: Callable[..., Any], inputs: list[Tensor], **options: Any
) -> list[Tensor]:
    """Outputs and gradients of one call of `function`, which is `layer` in some form."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    g = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *layer.parameters()], g)]


def compare(
    layer: torch.nn.Module, backend: str, *inputs: Tensor, steps: int = 2, **options: Any
) -> None:
    """The compiled layer and its copy in eager: outputs, gradients and every buffer."""
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for index in range(steps):
        shifted = [t + index for t in inputs]
        results = [
            step(layer, compiled, shifted, **options), step(eager, eager, shifted, **options)
        ]  # fmt: skip
        assert results[0][0].stride() == results[1][0].stride()
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for (name, ours), plain in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, msg=name)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_variants(name: str, with_mask: bool) -> None:
    make, shape = LAYERS[name]
    options = masked(shape[0]) if with_mask else {}
    compare(make(), "aot_eager", values(shape, torch.float32), **options)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("Layer", "RMS"))])
def test_with_a_residual(name: str) -> None:
    make, shape = LAYERS[name]
    inputs = [values(shape, torch.float32, seed=seed) for seed in range(2)]
    compare(make(), "aot_eager", *inputs, steps=1, **masked(shape[0]))


# A compiler of C++ each; what inductor sees of ours is one opaque operator and its strides.
@spread(
    "name",
    ("LayerNorm", "LayerNorm dim=1", "RMSNorm", "InstanceNorm1d, tracking", "GroupNorm",
     "RMSNorm gemma", "LocalResponseNorm", "FrozenBatchNorm", "BatchNorm1d"),
    keep=3,
)  # fmt: skip
def test_inductor(name: str) -> None:
    make, shape = LAYERS[name]
    compare(make(), "inductor", values(shape, torch.float32), **masked(shape[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", norms.ALL, ids=str)
def test_layouts_and_half_inputs(norm: Norm, dtype: torch.dtype) -> None:
    """The fake outputs must lie in memory as the kernels' do, or the compiled code reads wrong."""
    shape = norm.shapes[-1]
    x = values(shape, dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = norm.parameters(shape, dtype)
    compiled = torch.compile(
        lambda x, w, b: norm.ours(x, w, b) * 2, backend="aot_eager", fullgraph=True
    )
    y, expected = compiled(x, weight, bias), norm.ours(x, weight, bias) * 2
    assert y.dtype is dtype
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_batch_compiles_once(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    eager = copy.deepcopy(layer)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for batch in (7, 9, 12):  # none of the other sizes, for which torch would make a graph
        x, options = values((batch, *shape[1:]), torch.float32), of_lengths(batch, name)
        torch.testing.assert_close(compiled(x, **options), eager(x, **options))
    assert len(graphs) == 1
    for (buffer, ours), plain in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, plain, msg=buffer)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_export(name: str, dynamic: bool) -> None:
    make, shape = LAYERS[name]
    layer = make()
    eager = copy.deepcopy(layer)

    def inputs(n: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = values((n, *shape[1:]), torch.float32, seed=n)
        return x, of_lengths(n, name) if dynamic else masked(n)

    x, options = inputs(shape[0])
    batch = torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch}, **{key: {0: batch} for key in options}} if dynamic else None
    program = torch.export.export(layer, (x,), options, dynamic_shapes=shapes, strict=False)
    module = program.module()
    for n in (6, 9) if dynamic else (6, 6):
        x, options = inputs(n)
        torch.testing.assert_close(module(x, **options), eager(x, **options))
    for buffer, value in eager.named_buffers():
        if buffer in program.state_dict:
            torch.testing.assert_close(dict(module.named_buffers())[buffer], value, msg=buffer)


def test_inside_a_transformer_block() -> None:
    """Norms with and without a residual among other operators, in one graph."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.RMSNorm(8, casting="llama")
            self.second = nn.LayerNorm(8)
            self.mix = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            hidden = self.mix(self.first(x, mask=kept))
            normalized, total = self.second(hidden, x, kept)
            return total + self.mix(normalized)

    x = values(ROWS, torch.float32)
    compare(Block(), "aot_eager", x, kept=masked(6)["mask"])


def test_the_sum_of_a_compiled_call_alone() -> None:
    """A graph whose other output nobody reads."""
    x, residual = (values(ROWS, torch.float32, seed=seed) for seed in range(2))

    def total(x: Tensor, residual: Tensor) -> Tensor:
        return functional.add_rms_norm(x, residual, (8,))[1]

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf, residual)
    assert torch.equal(y, x + residual)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], torch.ones_like(x))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "LocalResponseNorm"])
def test_double_backward_through_a_compiled_layer_raises(name: str) -> None:
    """torch has none of a compiled graph; what must not happen is a wrong number."""
    make, shape = LAYERS[name]
    layer = make().double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = values(shape, torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.sum().backward()

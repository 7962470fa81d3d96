"""Models that were converted, fused and folded are compiled, exported and become ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import normally
from tests.onnx_export import export, operators_of, run

#: Models with batch norms, activations that are modules and functions, and layer norms of timm's.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050"),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1)),
}

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

#: float32, relative to the largest value; rounding of up to 50 layers. What is lost is 1e-2.
ROUNDING = 1e-5


def assert_near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * scale)


def assert_exports(model: nn.Module, expected: Tensor) -> list[str]:
    """Compiled, exported and as ONNX it gives what is expected; the operators of the last."""
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_near(compiled(X), expected)
    program = torch.export.export(model, (X,))
    assert_near(program.module()(X), expected)
    proto = export(program)
    assert_near(run(proto, X), expected)
    return operators_of(proto)


def evaluated(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    return model, model(X)


@pytest.mark.parametrize("name", ["convnext", pytest.param("mobilenetv3", marks=pytest.mark.slow)])
def test_converted(name: str) -> None:
    model, expected = evaluated(name)
    assert_exports(normally.convert(model), expected)


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "mobilenetv3"])
def test_converted_and_fused(name: str) -> None:
    model, expected = evaluated(name)
    operators = assert_exports(normally.fuse(normally.convert(model), X), expected)
    # onnx' optimizer folds what `fold` would.
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenetv3", marks=pytest.mark.slow)])
def test_folded_is_of_torchs_operators_alone(name: str) -> None:
    model, expected = evaluated(name)
    model = normally.fold(model, X)
    graph = torch.export.export(model, (X,)).graph
    assert not [node for node in graph.nodes if "normally" in str(node.target)]
    assert_exports(model, expected)

"""What the operators are for exporters: ONNX' own operators, with the same results."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from torch import Tensor

from normally import nn
from tests.onnx_export import export, operators_of, run

X = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
SEQUENCE = X[:, :, 0]

#: float32 in both; the order of sums differs: some units in the last place of values up to 5.
ROUNDING = {"rtol": 1e-5, "atol": 5e-6}

#: Layers with an input and the operators that must be in their graph, for both exporters.
LAYERS = {
    "batch": (nn.BatchNorm2d(8, act="hardswish"), X, {"BatchNormalization", "HardSwish"}),
    "batch without parameters": (nn.BatchNorm2d(8, affine=False), X, {"BatchNormalization"}),
    "batch of last dim": (nn.BatchNorm1d(4, channel_dim=-1), SEQUENCE, {"BatchNormalization"}),
    "layer": (nn.LayerNorm((4, 4)), X, {"LayerNormalization"}),
    "layer of dim 1": (nn.LayerNorm(8, dim=1, act="gelu"), X, {"LayerNormalization"}),
    "group": (nn.GroupNorm(2, 8, act="silu"), X, {"InstanceNormalization", "Sigmoid"}),
    "instance": (nn.InstanceNorm2d(8, affine=True), X, {"InstanceNormalization"}),
    "instance with statistics": (
        nn.InstanceNorm2d(8, track_running_stats=True), X, {"BatchNormalization"},
    ),
    "rms": (nn.RMSNorm(4), X, {"ReduceMean"}),
    "rms of 1 + weight": (
        nn.RMSNorm(4, casting="gemma", zero_centered_weight=True), X, {"ReduceMean"},
    ),
    "local response": (nn.LocalResponseNorm(3), X, {"AveragePool"}),
    "frozen batch": (nn.FrozenBatchNorm(8), X, {"BatchNormalization"}),
}  # fmt: skip


def settled(layer: torch.nn.Module) -> torch.nn.Module:
    """In evaluation, with parameters and statistics that show."""
    layer = copy.deepcopy(layer).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
    return layer


@pytest.mark.parametrize("older", [False, True], ids=["dynamo", "tracer"])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_is_standard_onnx(name: str, older: bool) -> None:
    layer, x, expected_operators = LAYERS[name]
    layer = settled(layer)
    proto = export(layer, x, older=older)
    torch.testing.assert_close(run(proto, x), layer(x).detach(), **ROUNDING)
    written_out = {"HardSwish", "Gelu"} if older else set()
    assert expected_operators - written_out <= set(operators_of(proto))
    assert onnx.TensorProto.DOUBLE not in [
        attribute.i
        for node in proto.graph.node if node.op_type == "Cast"
        for attribute in node.attribute if attribute.name == "to"
    ]  # fmt: skip


class Call(torch.nn.Module):
    """A layer's option that is a tensor, as a second input."""

    def __init__(self, layer: torch.nn.Module, option: str) -> None:
        super().__init__()
        self.layer, self.option = layer, option

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.layer(x, **{self.option: given})


@pytest.mark.parametrize("older", [False, True], ids=["dynamo", "tracer"])
@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8, dim=1)],
    ids=lambda layer: type(layer).__name__,
)
def test_masks(layer: torch.nn.Module, older: bool) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)[:, None]
    model = Call(settled(layer), "mask")
    output = run(export(model, SEQUENCE, mask, older=older), SEQUENCE, mask)
    torch.testing.assert_close(output, model(SEQUENCE, mask).detach(), **ROUNDING)


def test_residual() -> None:
    model = Call(settled(nn.BatchNorm2d(8, act="relu")), "residual")
    proto = export(model, X, X.flip(0))
    torch.testing.assert_close(run(proto, X, X.flip(0)), model(X, X.flip(0)).detach(), **ROUNDING)
    assert operators_of(proto) == ["BatchNormalization", "Add", "Relu"]


@pytest.mark.parametrize("older", [False, True], ids=["dynamo", "tracer"])
def test_training_normalizes_with_the_batch(older: bool) -> None:
    """An ONNX graph has no buffers that change; torch's own layer gives evaluation here."""
    layer = settled(nn.BatchNorm2d(8)).train()
    before = copy.deepcopy(layer.state_dict())
    output = run(export(layer, X, older=older), X)
    expected = torch.nn.functional.batch_norm(X, None, None, layer.weight, layer.bias, True)
    torch.testing.assert_close(output, expected.detach(), **ROUNDING)
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_half_precision() -> None:
    """A float32 layer on half inputs, and a layer that is half itself."""
    x = X.half()
    for layer in (settled(nn.BatchNorm2d(8)), settled(nn.RMSNorm(4, casting="llama")).half()):
        # Two roundings to float16 of values up to 4 may each fall to the other side.
        torch.testing.assert_close(run(export(layer, x), x), layer(x).detach(), rtol=2e-3, atol=0)


def test_any_batch_size() -> None:
    model = torch.nn.Sequential(
        *(settled(layer) for layer in (
            nn.BatchNorm1d(8, act="relu"), nn.LayerNorm(4), nn.GroupNorm(2, 8),
            nn.InstanceNorm1d(8), nn.RMSNorm(4), nn.LayerNorm(8, dim=1),
        ))
    )  # fmt: skip
    other = torch.cat([SEQUENCE, SEQUENCE.flip(0)])
    proto = export(model, SEQUENCE, dynamic_shapes=({0: "n"},))
    torch.testing.assert_close(run(proto, other), model(other).detach(), **ROUNDING)


def test_an_exported_program_keeps_the_operators_and_becomes_onnx() -> None:
    layer = settled(nn.BatchNorm1d(8, act="relu"))
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (SEQUENCE,), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes}
    assert "normally.batch_norm.default" in called
    assert operators_of(export(program)) == ["BatchNormalization", "Relu"]


def test_symbolic_sizes_take_strides_from_the_operator() -> None:
    """Not from the decomposition, which gives a transposed view here."""
    batch = torch.export.Dim("batch")
    layer = nn.LayerNorm(8, dim=1)
    program = torch.export.export(layer, (X,), dynamic_shapes=({0: batch},))
    (node,) = [n for n in program.graph.nodes if str(n.target) == "normally.layer_norm.default"]
    assert node.meta["val"][0].is_contiguous()

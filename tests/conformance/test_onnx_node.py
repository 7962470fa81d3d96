"""ONNX' own node tests of its normalization operators.

ONNX weighs the *old* value by batch norm's momentum and stores the *biased* variance:
running = momentum·running + (1 - momentum)·batch. So ours takes 1 - momentum and unbiased=False.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor

from normally import nn, reference
from tests.device import functional

with warnings.catch_warnings():
    # Loading the modules makes the cases; numpy's warnings there are about ONNX' own arrays.
    warnings.simplefilter("ignore")
    import onnx.backend.test.case.node as node_cases
    import onnx.backend.test.case.node.batch_normalization
    import onnx.backend.test.case.node.groupnormalization
    import onnx.backend.test.case.node.instance_normalization
    import onnx.backend.test.case.node.layernormalization
    import onnx.backend.test.case.node.lrn
    import onnx.backend.test.case.node.rmsnormalization  # noqa: F401

pytestmark = pytest.mark.usefixtures("born_on_device")

OPERATORS = {
    "BatchNormalization": 4, "GroupNormalization": 2, "InstanceNormalization": 2, "LRN": 2,
    "LayerNormalization": 19, "RMSNormalization": 19,
}  # fmt: skip
# One node each; the "expanded" twins of some are the same numbers through elementary operators.
CASES = {
    case.name: case
    for case in node_cases._NodeTestCases
    if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in OPERATORS
}


def test_the_cases_are_there() -> None:
    found = [case.model.graph.node[0].op_type for case in CASES.values()]
    for operator, count in OPERATORS.items():
        assert found.count(operator) >= count, operator


def names(operator: str) -> list[str]:
    return sorted(n for n, c in CASES.items() if c.model.graph.node[0].op_type == operator)


def load(name: str) -> tuple[dict[str, Any], list[Tensor], list[Tensor], dict[str, float]]:
    """Attributes, inputs, outputs and the tolerance that ONNX asks."""
    case = CASES[name]
    (node,) = case.model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    ((inputs, outputs),) = case.data_sets
    tolerance = {"rtol": case.rtol, "atol": case.atol}
    return (
        attributes, [torch.tensor(a) for a in inputs], [torch.tensor(a) for a in outputs], tolerance
    )  # fmt: skip


@pytest.mark.parametrize("name", names("BatchNormalization"))
def test_batch_normalization(name: str) -> None:
    attributes, (x, scale, bias, mean, var), outputs, tolerance = load(name)
    training = bool(attributes.get("training_mode", 0))
    eps, momentum = attributes.get("epsilon", 1e-5), 1 - attributes.get("momentum", 0.9)
    layer = nn.BatchNorm2d(x.shape[1], eps, momentum, unbiased=False).train(training)
    with torch.no_grad():
        for own, given in zip(
            (layer.weight, layer.bias, layer.running_mean, layer.running_var),
            (scale, bias, mean, var), strict=True,
        ):  # fmt: skip
            assert own is not None
            own.copy_(given)
    y = functional.batch_norm(x, mean, var, scale, bias, training, momentum, eps, unbiased=False)
    torch.testing.assert_close(y, outputs[0], **tolerance)
    torch.testing.assert_close(layer(x).detach(), outputs[0], **tolerance)
    if training:
        for found in ((mean, var), (layer.running_mean, layer.running_var)):
            torch.testing.assert_close(found[0], outputs[1], **tolerance)
            torch.testing.assert_close(found[1], outputs[2], **tolerance)
    else:
        assert len(outputs) == 1


@pytest.mark.parametrize("name", names("LayerNormalization"))
def test_layer_normalization(name: str) -> None:
    """Mean and 1/√(var + eps) are outputs there; here they are the reference's."""
    attributes, (x, scale, bias), (wanted, mean, rstd), tolerance = load(name)
    start = attributes.get("axis", -1) % x.dim()
    eps = attributes.get("epsilon", 1e-5)
    y = functional.layer_norm(x, x.shape[start:], scale, bias, eps)
    torch.testing.assert_close(y, wanted, **tolerance)
    layer = nn.LayerNorm(x.shape[start:], eps)
    with torch.no_grad():
        layer.weight.copy_(scale)
        layer.bias.copy_(bias)
    torch.testing.assert_close(layer(x).detach(), wanted, **tolerance)
    found = reference.moments(x.double(), range(start, x.dim()))
    torch.testing.assert_close(found[0].float(), mean, **tolerance)
    torch.testing.assert_close((found[1] + eps).rsqrt().float(), rstd, **tolerance)


@pytest.mark.parametrize("name", names("RMSNormalization"))
def test_rms_normalization(name: str) -> None:
    attributes, (x, scale), (wanted,), tolerance = load(name)
    start = attributes.get("axis", -1) % x.dim()
    eps = attributes.get("epsilon", 1e-5)
    for casting in reference.CASTINGS:  # all the same in float32
        y = functional.rms_norm(x, x.shape[start:], scale, eps, casting=casting)
        torch.testing.assert_close(y, wanted, **tolerance)
    layer = nn.RMSNorm(x.shape[start:], eps)
    with torch.no_grad():
        layer.weight.copy_(scale)
    torch.testing.assert_close(layer(x).detach(), wanted, **tolerance)


@pytest.mark.parametrize("name", names("GroupNormalization"))
def test_group_normalization(name: str) -> None:
    attributes, (x, scale, bias), (wanted,), tolerance = load(name)
    groups, eps = attributes["num_groups"], attributes.get("epsilon", 1e-5)
    y = functional.group_norm(x, groups, scale, bias, eps)
    torch.testing.assert_close(y, wanted, **tolerance)
    layer = nn.GroupNorm(groups, x.shape[1], eps)
    with torch.no_grad():
        layer.weight.copy_(scale)
        layer.bias.copy_(bias)
    torch.testing.assert_close(layer(x).detach(), wanted, **tolerance)


@pytest.mark.parametrize("name", names("InstanceNormalization"))
def test_instance_normalization(name: str) -> None:
    attributes, (x, scale, bias), (wanted,), tolerance = load(name)
    eps = attributes.get("epsilon", 1e-5)
    y = functional.instance_norm(x, weight=scale, bias=bias, eps=eps)
    torch.testing.assert_close(y, wanted, **tolerance)
    layer = nn.InstanceNorm2d(x.shape[1], eps, affine=True)
    with torch.no_grad():
        layer.weight.copy_(scale)
        layer.bias.copy_(bias)
    torch.testing.assert_close(layer(x).detach(), wanted, **tolerance)


@pytest.mark.parametrize("name", names("LRN"))
def test_lrn(name: str) -> None:
    """ONNX divides alpha by the size as torch does, and calls k the bias."""
    attributes, (x,), (wanted,), tolerance = load(name)
    size = attributes["size"]
    assert size % 2 == 1  # for an even one ONNX has the longer half above, torch below
    rest = [attributes.get(a, d) for a, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))]
    torch.testing.assert_close(functional.local_response_norm(x, size, *rest), wanted, **tolerance)
    torch.testing.assert_close(nn.LocalResponseNorm(size, *rest)(x), wanted, **tolerance)

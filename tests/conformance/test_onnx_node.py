"""ONNX' own node tests of BatchNormalization.

ONNX weighs the *old* value by its momentum and stores the *biased* variance:
running = momentum·running + (1 - momentum)·batch. So ours takes 1 - momentum and unbiased=False.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from onnx import helper

from normally import functional, nn

with warnings.catch_warnings():
    # Loading the module makes the cases; numpy's warnings there are about ONNX' own arrays.
    warnings.simplefilter("ignore")
    import onnx.backend.test.case.node as node_cases
    import onnx.backend.test.case.node.batch_normalization  # noqa: F401

CASES = {case.name: case for case in node_cases._NodeTestCases if "batchnorm" in case.name}


def test_the_four_cases_are_there() -> None:
    assert set(CASES) >= {
        "test_batchnorm_example", "test_batchnorm_epsilon",
        "test_batchnorm_example_training_mode", "test_batchnorm_epsilon_training_mode",
    }  # fmt: skip


def load(name: str) -> tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor], Any]:
    case = CASES[name]
    (node,) = case.model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    ((inputs, outputs),) = case.data_sets
    return (
        attributes, [torch.tensor(a) for a in inputs], [torch.tensor(a) for a in outputs], case
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_node(name: str) -> None:
    attributes, (x, scale, bias, mean, var), outputs, case = load(name)
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
    tolerance = {"rtol": case.rtol, "atol": case.atol}
    torch.testing.assert_close(y, outputs[0], **tolerance)
    torch.testing.assert_close(layer(x).detach(), outputs[0], **tolerance)
    if training:
        for found in ((mean, var), (layer.running_mean, layer.running_var)):
            torch.testing.assert_close(found[0], outputs[1], **tolerance)
            torch.testing.assert_close(found[1], outputs[2], **tolerance)
    else:
        assert len(outputs) == 1

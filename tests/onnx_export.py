"""Models as ONNX, and ONNX run by onnxruntime."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor


def export(model: Any, *inputs: Tensor, older: bool = False, **options: Any) -> onnx.ModelProto:
    """The model, or an exported program, as ONNX, in its present mode.

    Args:
        model: what is exported.
        inputs: the example.
        older: use the exporter that traces, `dynamo=False`.
        options: of the exporter.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters use what torch deprecates
        if older:
            if not list(model.children()):  # it hands a root its keyword arguments by position
                model = torch.nn.Sequential(model)
            mode = torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(model, inputs, file, dynamo=False, training=mode, **options)
        else:
            program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)
            assert program is not None
            program.save(file)
    proto = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    return proto


def operators_of(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def run(proto: onnx.ModelProto, *inputs: Tensor) -> Tensor:
    """The first output, by onnxruntime."""
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])

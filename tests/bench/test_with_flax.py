"""Flax's column: the same function in Flax's layout, and what is said where there is no Flax."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from normally.bench import run, with_flax
from normally.bench.accuracy import make_inputs
from normally.bench.main import OPERATORS
from normally.bench.measure import make_step
from normally.bench.operator import LAYOUTS, MODES, Case
from normally.bench.shapes import Shape, select
from normally.bench.with_flax import Flax

from .helpers import as_tuple

OTHER = Flax()
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "flax")),
    reason="the extra [bench] is not installed",
)
SHAPES = [
    Shape("1", "batch_norm", (4, 16, 6, 6), "relu", residual=True),
    Shape("5a", "batch_norm", (4, 16, 6, 6), "hardswish"),
    Shape("6", "batch_norm", (4, 16, 6, 6), "leaky_relu"),
    Shape("8a", "batch_norm", (32, 16), "relu"),
    Shape("7b", "instance_norm", (2, 8, 3, 4, 5)),
    Shape("9a", "group_norm", (2, 12, 5, 5), "silu", options={"num_groups": 4}),
    Shape("10a", "layer_norm", (9, 32)),
    Shape("11a", "rms_norm", (9, 32)),
    Shape("11a", "add_rms_norm", (9, 32), residual=True),
]


@installed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.operator}{shape.fusion}")
def test_it_is_the_same_function(shape, dtype):
    operator = OPERATORS[shape.operator]
    OTHER.describe()
    case = Case(shape, operator.layouts(shape)[-1], dtype, fused=True)
    inputs = make_inputs(case, torch.Generator().manual_seed(0), mean=1.0)
    module, theirs = OTHER.build(operator, case), operator.theirs(case)
    # Of bfloat16: two roundings below 4.
    tolerance = 2e-5 if dtype == "float32" else 2**-6
    for output, right in zip(as_tuple(module(*inputs)), as_tuple(theirs(*inputs)), strict=True):
        assert output.dtype is case.torch_dtype
        torch.testing.assert_close(output, right, rtol=2**-8, atol=tolerance)
    if dtype == "bfloat16" and case.act not in (None, "silu"):
        return  # beside a kink the two roundings may take different derivatives
    grads = [torch.randn(shape.size).to(case.torch_dtype) for _ in range(operator.outputs)]
    _, (parameters, *found), _ = OTHER.make_step(module, inputs, "forward_backward", grads)()
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = make_step(theirs, leaves, "forward_backward", grads)()
    found = [torch.from_dlpack(gradient).movedim(-1, 1) for gradient in found]
    # The scale is torch's weight; torch lists it before the bias.
    found += [torch.from_dlpack(parameters[n]) for n in ("scale", "bias") if n in parameters]
    for gradient, right in zip(found, expected, strict=True):
        # Sums of up to 144 terms; of bfloat16 those are rounded to 8 bits each.
        tolerance = 1e-4 if dtype == "float32" else 0.1
        torch.testing.assert_close(gradient.to(right.dtype), right, rtol=0.02, atol=tolerance)


@installed
def test_the_pool_is_counted(monkeypatch):
    assert "XLA's pool of" in OTHER.describe()
    operator = OPERATORS["batch_norm"]
    (shape,) = select("batch_norm", ["1"])
    for size, expected in ((2, True), (3, False), (None, True)):
        monkeypatch.setattr(with_flax, "_pool_size", lambda size=size: size)
        case = Case(shape, "channels_last", "float32", fused=True, threads=2)
        assert OTHER.has(operator, case) is expected


def test_it_has_training_with_the_channels_last(monkeypatch):
    monkeypatch.setattr(with_flax, "_pool_size", lambda: 1)
    cases = [
        Case(case.shape, case.layout, case.dtype, case.fused, mode)
        for operator in OPERATORS.values()
        for group in operator.groups(select(operator.name), ["float32", "float64"], LAYOUTS)
        for case in group
        for mode in MODES
        if OTHER.has(operator, Case(case.shape, case.layout, case.dtype, case.fused, mode))
    ]
    assert {case.shape.operator for case in cases} == set(OPERATORS)
    assert all(case.fused and case.dtype == "float32" for case in cases)
    assert {case.mode for case in cases} == {"forward", "forward_backward"}
    assert {(len(case.shape.size) > 2, case.layout) for case in cases} == {
        (True, "channels_last"),
        (False, "contiguous"),
    }


def test_where_it_is_not_installed_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(with_flax.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"normally\[bench\]\""):
        run(["batch_norm"], shapes=["12"], also=["flax"])

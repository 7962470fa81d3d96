"""oneDNN's column, and that torch has nothing more of oneDNN's norms to measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normally.bench.accuracy import make_inputs
from normally.bench.batch_norm import BatchNorm
from normally.bench.group_norm import GroupNorm
from normally.bench.operator import LAYOUTS, MODES, Case
from normally.bench.shapes import Shape, select
from normally.bench.with_onednn import OneDNN

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
OTHER, OPERATOR = OneDNN(), BatchNorm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True])
def test_it_is_the_same_function(dtype, residual):
    shape = Shape("1", "batch_norm", (4, 16, 6, 6), "relu", residual)
    case = Case(shape, "contiguous", dtype, fused=True)
    assert OTHER.has(OPERATOR, case)
    inputs = make_inputs(case, torch.Generator().manual_seed(0), mean=1.0)
    module, theirs = OTHER.build(OPERATOR, case), OPERATOR.theirs(case)
    # Of bfloat16: two roundings below 4.
    tolerance = 2e-5 if dtype == "float32" else 2**-6
    torch.testing.assert_close(module(*inputs), theirs(*inputs), rtol=2**-8, atol=tolerance)
    grad = torch.randn(shape.size).to(case.torch_dtype)
    gradients = OTHER.make_step(module, inputs, "forward_backward", [grad])()
    assert len(gradients) == len(inputs) + 2
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(theirs(*leaves), [*leaves, *theirs.parameters()], grad)
    for gradient, right in zip(gradients, expected, strict=True):
        # Sums of 144 terms; of bfloat16 those are rounded to 8 bits each.
        tolerance = 1e-4 if dtype == "float32" else 0.1
        dense = gradient.to_dense() if gradient.layout is torch._mkldnn else gradient
        torch.testing.assert_close(dense.to(right.dtype), right, rtol=tolerance, atol=tolerance)


def test_it_has_contiguous_images_with_relu():
    cases = [
        Case(case.shape, case.layout, case.dtype, case.fused, mode)
        for operator in (OPERATOR, GroupNorm())
        for group in operator.groups(select(operator.name), ["float32", "float64"], LAYOUTS)
        for case in group
        for mode in MODES
        if OTHER.has(operator, Case(case.shape, case.layout, case.dtype, case.fused, mode))
    ]
    assert {case.shape.label for case in cases} == {"1", "2", "3", "4", "12a"}
    assert {(case.layout, case.dtype, case.fused) for case in cases} == {
        ("contiguous", "float32", True)
    }
    assert {case.mode for case in cases} == {"forward", "forward_backward"}


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.LayerNorm(8), (4, 16, 8, 8)),
        (nn.GroupNorm(4, 16), (4, 16, 8, 8)),
        (nn.InstanceNorm2d(16, affine=True), (4, 16, 8, 8)),
        (nn.RMSNorm(8), (4, 16, 8, 8)),
        (nn.BatchNorm1d(16), (8, 16)),
        (nn.BatchNorm3d(16), (2, 16, 4, 4, 4)),
        (nn.Hardswish(), (4, 16, 8, 8)),
        (nn.LeakyReLU(), (4, 16, 8, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_the_page_says_torch_does_not_have(module, size):
    with pytest.raises(RuntimeError):
        module(torch.randn(size).to_mkldnn())


def test_the_version_is_known():
    assert OTHER.describe().startswith("oneDNN ")
    assert "unknown" not in OTHER.describe()

"""The composition with torch: order of its parts, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normally import reference
from normally.bench.operator import Case
from normally.bench.shapes import SHAPES, Shape
from normally.bench.torch_block import ACTIVATIONS, TorchBlock, compose, parts


def make_case(act: str | None, residual: bool, fused: bool = True) -> Case:
    return Case(
        Shape("1", "batch_norm", (2, 3, 4, 4), act, residual), "contiguous", "float32", fused
    )


def test_every_activation_of_the_shapes_is_known():
    assert {shape.act for shape in SHAPES} - {None} == set(ACTIVATIONS)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_sum_comes_before_the_activation(act):
    block = compose(nn.Identity(), make_case(act, residual=True))
    x, residual = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(block(x, residual), reference.activate(x + residual, act))
    assert parts(block)[1] == act


def test_a_norm_alone_is_not_wrapped():
    norm = nn.BatchNorm2d(3)
    assert compose(norm, make_case(None, residual=False)) is norm
    assert compose(norm, make_case("relu", residual=True, fused=False)) is norm
    assert isinstance(compose(norm, make_case("relu", residual=False)), TorchBlock)
    assert parts(norm) == (norm, None)

"""Kernels go to the current stream, and wait for nothing else than it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.gpu.layers import (
    LAYERS,
    assert_same_buffers,
    assert_same_step,
    cotangent,
    make,
    sample,
    step,
)

#: About half a second, for which an input is not there yet.
CYCLES = 1_000_000_000


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_that_comes_late_on_a_side_stream(name: str) -> None:
    """On any other stream a kernel would read the NaN that lies there in the meantime."""
    layer, g, source = make(name), cotangent(name), sample(name)
    twin = copy.deepcopy(layer)
    expected = step(twin, source, g)  # and nothing is left to compile
    x = torch.full_like(source, math.nan).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            x.copy_(source)
        results = step(layer, x, g)
        done = side.record_event()
    done.synchronize()
    assert_same_step(results, expected)
    assert_same_buffers(layer, twin)


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_that_comes_late_on_a_side_stream(name: str) -> None:
    """autograd runs a backward on the stream of its forward."""
    layer, source = make(name), cotangent(name)
    x = sample(name)
    expected = step(copy.deepcopy(layer), x, source)
    g = torch.full_like(source, math.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = layer(x)
        torch.cuda._sleep(CYCLES)
        g.copy_(source)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], g)
        done = side.record_event()
    done.synchronize()
    assert_same_step([y.detach(), *gradients], expected)


def test_two_streams_at_once() -> None:
    """The same layer's kernels side by side have no scratch in common."""
    names = ("BatchNorm2d", "LayerNorm", "RMSNorm", "GroupNorm")
    expected = {n: step(make_seeded(n), sample(n), cotangent(n)) for n in names}
    layers = {n: [make_seeded(n) for _ in range(8)] for n in names}
    inputs = {n: [sample(n) for _ in range(8)] for n in names}
    cotangents = {n: cotangent(n) for n in names}
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    torch.cuda.synchronize()
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for name in names:
                found = step(layers[name][index], inputs[name][index], cotangents[name])
                results.append((name, found))
    torch.cuda.synchronize()
    for name, found in results:
        assert_same_step(found, expected[name], name)


def make_seeded(name: str) -> torch.nn.Module:
    """The same parameters each time."""
    torch.manual_seed(3)
    return make(name)

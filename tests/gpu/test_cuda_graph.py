"""Layers captured in a CUDA graph: every replay is a step of training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.gpu.layers import (
    LAYERS,
    assert_same_buffers,
    assert_same_step,
    cotangent,
    make,
    sample,
    step,
    warmed_up,
)


def captured(
    layer: torch.nn.Module, x: Tensor, g: Tensor
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of forward and backward, and what each replay writes its results to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warmed_up(layer, x, g)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, g)
    return graph, results


@pytest.mark.parametrize("name", LAYERS)
def test_replays_are_steps_of_training(name: str) -> None:
    layer, g = make(name), cotangent(name)
    eager = copy.deepcopy(layer)
    x = sample(name)
    graph, results = captured(layer, x, g)
    assert_same_buffers(layer, eager)  # recording runs nothing
    for seed in range(1, 4):
        fresh = sample(name, seed)
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        assert_same_step(results, step(eager, fresh, g), f"replay {seed}")
        assert_same_buffers(layer, eager)
    if name.startswith("BatchNorm") and layer.training:
        assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_bad_batch_is_refused_and_counted_in_a_replay(momentum: float | None) -> None:
    """Which channels are bad is read on the device, so a graph sees it each time anew."""
    name = "BatchNorm2d"
    layer, g = make(name), cotangent(name)
    layer.momentum = momentum
    eager = copy.deepcopy(layer)
    x = sample(name)
    graph, results = captured(layer, x, g)
    for seed, bad in enumerate(((), (3,), (0, 63), ()), start=1):
        fresh = sample(name, seed).detach()
        for channel in bad:
            fresh[seed, channel, 0, 0] = math.nan
        fresh.requires_grad_()
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        assert_same_step(results, step(eager, fresh, g), f"replay {seed}")
        assert_same_buffers(layer, eager)
    assert layer.skipped_updates.item() == 3
    assert layer.running_mean.isfinite().all()


def test_a_network_in_one_graph() -> None:
    """Several layers share the graph's memory; none writes into another's."""
    names = ("BatchNorm2d", "BatchNorm2d, evaluation", "FrozenBatchNorm")  # all of 64 channels
    network = torch.nn.Sequential(*(make(name) for name in names))
    g = cotangent(names[0])
    eager = copy.deepcopy(network)
    x = sample(names[0])
    graph, results = captured(network, x, g)
    for seed in range(1, 4):
        fresh = sample(names[0], seed)
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        assert_same_step(results, step(eager, fresh, g), f"replay {seed}")
    assert_same_buffers(network, eager)

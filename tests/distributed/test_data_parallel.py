"""The layer in a DistributedDataParallel and in an FSDP2: N processes train as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normally import convert_sync_batchnorm
from tests.distributed.launch import results, run
from tests.helpers import values

SIZE = 2
STEPS = 100
#: Samples a process, of every step.
SAMPLES = 3
RATE = 0.05
#: Of the weights after all steps, which are of the order of 1: float64 rounds at 1e-16, another
#: order of the sums makes a few of it a step, and a hundred steps amplify that by powers of 10.
TOLERANCE = 1e-10


def _net() -> nn.Sequential:
    """The same in every process: two batch norms of torch's, in float64."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    ).double()


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """What all processes have together. Theirs differ: the second's has another mean."""
    x = values((SIZE * SAMPLES, 2, 5, 5), torch.float64, seed=step)
    x[SAMPLES:] += 2
    return x, values((SIZE * SAMPLES, 3), torch.float64, seed=1000 + step)


def _train(net: nn.Module, rank: int | None) -> dict[str, Tensor]:
    """The state after all steps: on the samples of one process, or of all."""
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    for step in range(STEPS):
        x, target = (t if rank is None else t.split(SAMPLES)[rank] for t in _batch(step))
        optimizer.zero_grad()
        # Batches are of one size, so the mean of the processes' mean losses is that of all.
        (net(x) - target).square().mean().backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def _in_data_parallel(rank: int, **options: Any) -> dict[str, Tensor]:
    net = convert_sync_batchnorm(_net())
    return _train(DistributedDataParallel(net, **options), rank)


def _wrapped_then_converted(rank: int) -> dict[str, Tensor]:
    return _train(convert_sync_batchnorm(DistributedDataParallel(_net())), rank)


def _without_broadcast(rank: int) -> dict[str, Tensor]:
    # What rank 0 has at the end it has not told the others.
    return _in_data_parallel(rank, broadcast_buffers=False)


def _unconverted(rank: int) -> dict[str, Tensor]:
    return _train(DistributedDataParallel(_net(), broadcast_buffers=False), rank)


def _compare(states: list[dict[str, Tensor]]) -> float:
    """How far the weights are from one process's; the states of all are the same bits."""
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, found in state.items():
            assert torch.equal(found, states[0][name]), name
    state = {name.removeprefix("module."): t for name, t in states[0].items()}
    expected = _train(_net(), None)
    assert state.keys() == expected.keys()
    assert int(state["1.num_batches_tracked"]) == STEPS
    return max(float((state[name] - t).abs().max()) for name, t in expected.items())


@pytest.mark.parametrize(
    "function", [_in_data_parallel, _without_broadcast, _wrapped_then_converted]
)
def test_a_hundred_steps_are_those_of_one_process(function: Any) -> None:
    assert _compare(results(SIZE, function)) < TOLERANCE


def test_without_conversion_they_are_not() -> None:
    """The test above can fail: the statistics of the processes do differ."""
    first, second = results(SIZE, _unconverted)
    assert not torch.allclose(first["module.1.running_mean"], second["module.1.running_mean"])
    assert not torch.allclose(_train(_net(), None)["0.weight"], first["module.0.weight"])


# --- more than one forward a backward


def _two_forwards(rank: int | None) -> dict[str, Tensor]:
    """The gradients of a step of two forwards and one backward, and the state after three."""
    net: nn.Module = _net()
    if rank is not None:
        net = DistributedDataParallel(convert_sync_batchnorm(net))
    for step in range(3):
        batches = [_batch(step)[0], _batch(10 + step)[0]]
        first, second = (net(x if rank is None else x.split(SAMPLES)[rank]) for x in batches)
        net.zero_grad()
        (first * second.sigmoid()).mean().backward()
    out = {name: t.detach().clone() for name, t in net.state_dict().items()}
    for name, p in net.named_parameters():
        assert p.grad is not None
        out[f"{name}.grad"] = p.grad
    return {name.removeprefix("module."): t for name, t in out.items()}


def test_two_forwards_before_a_backward() -> None:
    expected = _two_forwards(None)
    assert int(expected["1.num_batches_tracked"]) == 6
    first, second = results(SIZE, _two_forwards)
    assert first.keys() == second.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], wanted, rtol=1e-10, atol=1e-12)


# --- what torch refuses


def _wrap(rank: int, ours: bool) -> str:
    convert = convert_sync_batchnorm if ours else nn.SyncBatchNorm.convert_sync_batchnorm
    try:
        DistributedDataParallel(convert(_net()))
    except ValueError as error:
        return str(error)
    return ""


def test_the_check_for_torchs_layers_does_not_bite() -> None:
    assert results(SIZE, _wrap, True) == ["", ""]
    for said in results(SIZE, _wrap, False):  # it is still there
        assert "SyncBatchNorm layers only work with GPU modules" in said


# --- fully_shard


def _fully_sharded(rank: int) -> dict[str, Tensor]:
    """The state after all steps; parameters are whole again, and the same everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = _net()
    convert_sync_batchnorm(net)
    mesh = init_device_mesh("cpu", (SIZE,))
    for child in (0, 3):
        fully_shard(net[child], mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert isinstance(net[1].weight, DTensor)  # of which each process has a part
    state = _train(net, rank)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


def test_fully_shard_is_one_process() -> None:
    outcomes = run(SIZE, _fully_sharded)
    for o in outcomes:
        if o.error is not None and "_sharded" in o.error and "NotImplementedError" in o.error:
            pytest.skip(f"this torch has no fully_shard over gloo: {o.error.splitlines()[0]}")
        assert o.exitcode == 0, o.error
    assert _compare([o.value for o in outcomes]) < TOLERANCE

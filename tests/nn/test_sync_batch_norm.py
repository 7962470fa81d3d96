"""SyncBatchNorm as a layer: torch's signature, our options, one process, and several."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from normally import nn
from tests.distributed.launch import results, run
from tests.helpers import assert_same_bits, cpu_only, values
from tests.nn.layer_checks import check_located, check_signature, check_symbolic_tracing

OURS = (
    "act", "act_param", "channel_dim", "unbiased", "correction", "on_single_value",
    "memory_efficient",
)  # fmt: skip
SHAPES = [(6, 3), (6, 3, 4), (6, 3, 4, 2), (6, 3, 2, 1, 2), (3, 3, 2, 1, 2, 2)]


def test_signature_and_classes() -> None:
    check_signature(nn.SyncBatchNorm, torch.nn.SyncBatchNorm, OURS)
    layer = nn.SyncBatchNorm(3)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, torch.nn.SyncBatchNorm)  # DistributedDataParallel refuses that
    assert repr(layer) == repr(torch.nn.SyncBatchNorm(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"act": "relu"}, {"momentum": None}], ids=str)
def test_without_processes_it_is_batch_norm(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer, plain = nn.SyncBatchNorm(3, **options), nn.BatchNorm1d(3, **options)
    x = values(shape, torch.float32)
    flat = x.movedim(1, 0).flatten(1).unsqueeze(0)
    y = layer(x)
    torch.testing.assert_close(y.movedim(1, 0).flatten(1), plain(flat)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    layer.eval()
    plain.eval()
    torch.testing.assert_close(layer(x).movedim(1, 0).flatten(1), plain(flat)[0])


def test_state_dicts_both_ways() -> None:
    layer = nn.SyncBatchNorm(3)
    layer(values((6, 3, 4), torch.float32))
    for other in (torch.nn.SyncBatchNorm(3), torch.nn.BatchNorm2d(3), nn.BatchNorm1d(3)):
        other.load_state_dict(layer.state_dict(), strict=True)
        fresh = nn.SyncBatchNorm(3)
        fresh.load_state_dict(other.state_dict(), strict=True)
        for name, value in layer.state_dict().items():
            assert_same_bits(fresh.state_dict()[name], value, name)


def test_copies_and_tracing() -> None:
    x = values((6, 3, 4), torch.float32)
    layer = nn.SyncBatchNorm(3, act="relu")
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert other.weight is not layer.weight
        assert_same_bits(other(x), copy.deepcopy(layer)(x))
    check_symbolic_tracing(nn.SyncBatchNorm(3), x, torch.rand(6, 4) < 0.5)


def test_refused() -> None:
    make = nn.SyncBatchNorm
    x = values((6, 3, 4), torch.float32)
    check_located(lambda: make(3), x[0, 0], ValueError, "expected at least 2D input (got 1D input)")
    check_located(lambda: make(4), x, ValueError, "running_mean should contain 3 elements not 4")
    with pytest.raises(TypeError, match=r"SyncBatchNorm: process_group must be a torch\.dist"):
        make(3, process_group=[0, 1])  # a list of ranks is no group


# --- in processes


def _train(rank: int, world: int, cuts: list[int], ddp: bool, act: str | None) -> dict[str, Any]:
    model = network(nn.SyncBatchNorm, act)
    called: torch.nn.Module = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    for seed in range(5):
        x = values((cuts[-1], 3, 4), torch.float64, seed)
        own = x[([0, *cuts])[rank] : cuts[rank]]
        optimizer.zero_grad()
        y = called(own)
        loss = y.square().sum() / cuts[-1]
        (loss * world if ddp else loss).backward()  # it divides by the number of processes
        if not ddp:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        outputs.append(y.detach())
    model.eval()
    outputs.append(model(own))  # every process by itself
    return {"outputs": outputs, "state": model.state_dict()}


def network(norm: Any, act: str | None) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv1d(3, 4, 3, padding=1), norm(4, act=act), torch.nn.Conv1d(4, 2, 1), norm(2)
    ).double()


@cpu_only("gloo between processes")
@pytest.mark.parametrize(("world", "cuts"), [(2, [4, 6]), (2, [6, 6]), (4, [1, 4, 4, 7])])
@pytest.mark.parametrize("ddp", [False, True])
def test_several_processes_train_as_one(world: int, cuts: list[int], ddp: bool) -> None:
    """Other sizes in each, and none at all in one."""
    model = network(nn.BatchNorm1d, "silu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for seed in range(5):
        x = values((cuts[-1], 3, 4), torch.float64, seed)
        optimizer.zero_grad()
        y = model(x)
        (y.square().sum() / cuts[-1]).backward()
        optimizer.step()
        expected.append(y.detach())
    model.eval()
    expected.append(model(x).detach())
    found = results(world, _train, world, cuts, ddp, "silu")
    for seed, y in enumerate(expected):
        together = torch.cat([process["outputs"][seed] for process in found])
        torch.testing.assert_close(together, y, rtol=0, atol=1e-12)
    for process in found:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(process["state"][name], value, rtol=0, atol=1e-12)
        for name, value in found[0]["state"].items():
            if "running" in name:
                assert_same_bits(process["state"][name], value, name)


def _compiled(rank: int) -> list[Tensor]:
    warnings.simplefilter("ignore")  # torch's compiler loads its own deprecated parts
    x = values((6, 3, 4), torch.float64)[rank * 2 : rank * 2 + 2 + 2 * rank].requires_grad_()
    found = []
    for compiles in (False, True):
        layer = nn.SyncBatchNorm(3, act="relu", momentum=None, dtype=torch.float64)
        model = torch.nn.Sequential(layer)
        if compiles:
            model = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = model(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found.append(torch.cat((y.flatten(), gradient.flatten(), layer.running_var)).detach())
    return found


@cpu_only("gloo between processes")
def test_compiled_without_a_break() -> None:
    for eager, compiled in results(2, _compiled):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-13)


def _groups(rank: int) -> Tensor:
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    layer = nn.SyncBatchNorm(3, dtype=torch.float64, process_group=pairs[rank // 2])
    layer(values((8, 3, 4), torch.float64)[2 * rank : 2 * rank + 2])
    return layer.running_mean


@cpu_only("gloo between processes")
def test_groups_keep_to_themselves() -> None:
    x = values((8, 3, 4), torch.float64)
    found = results(4, _groups)
    for pair in range(2):
        plain = nn.BatchNorm1d(3, dtype=torch.float64)
        plain(x[4 * pair : 4 * pair + 4])
        for running_mean in found[2 * pair : 2 * pair + 2]:
            torch.testing.assert_close(running_mean, plain.running_mean, rtol=0, atol=1e-13)
    assert not torch.equal(found[0], found[2])


def _other_channels(rank: int) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), nn.SyncBatchNorm(3 + rank))
    model(torch.randn(2, 3 + rank, 4))


@cpu_only("gloo between processes")
def test_an_error_names_the_layer_by_its_path() -> None:
    for outcome in run(2, _other_channels):
        assert not outcome.hung
        assert outcome.error is not None
        assert outcome.error.startswith("ValueError")
        assert "SyncBatchNorm at 1 of Sequential" in outcome.error


def _alone(rank: int) -> bool:
    """Evaluation, and training without a group, ask nobody: rank 1 does not come."""
    layer = nn.SyncBatchNorm(3)
    untracked = nn.SyncBatchNorm(3, track_running_stats=False).eval()
    if rank == 0:
        layer.eval()(torch.randn(2, 3))
        untracked(torch.randn(2, 3))
    return True


@cpu_only("gloo between processes")
def test_evaluation_asks_nobody() -> None:
    assert results(2, _alone, timeout=60.0) == [True, True]
